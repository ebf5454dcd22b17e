"""The parts of a run that survive a process.

May import formula, data, disk and plan.
"""
