"""Files and folders published whole, locks, the environment. No torch on top.

Imports no other room.
"""
