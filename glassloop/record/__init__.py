"""What is known of a run and who receives it: records, observers, trackers, one reader.

May import config and disk.
"""
