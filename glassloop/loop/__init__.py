"""One run: launch, build, replica, memory, evaluation, watchdog, ways to end.

May import all rooms above it but report.
"""
