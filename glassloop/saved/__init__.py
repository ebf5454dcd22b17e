"""The parts of a run that survive a process.

May import config, data, disk, formula and plan.
"""
