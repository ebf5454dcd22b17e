"""One run: launch, build, replica, memory, evaluation, watchdog, ways to end.

May import all above but report.
"""
