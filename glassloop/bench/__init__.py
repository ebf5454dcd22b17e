"""Speed and cost of updates: arms in fresh processes, matrices, tables.

May import verify, replay, report and above.
"""
