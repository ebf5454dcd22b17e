"""Speed and cost of updates: arms in fresh processes, a matrix of them, tables.

May import verify, replay, report and what stands above them.
"""
