"""After training: generate, evaluate, merge, model card.

May import loop, report and above.
"""
