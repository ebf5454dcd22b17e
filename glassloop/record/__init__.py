"""Records of a run, observers, trackers, the one reader.

May import config and disk.
"""
