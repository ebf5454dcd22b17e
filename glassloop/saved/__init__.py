"""What survives a process: state, checkpoint, capsule, resuming.

May import formula, data, disk and plan.
"""
