"""Files: opened as a stranger's, published whole, locks, secrets, the environment.

No torch on top. May import nothing of ours.
"""
