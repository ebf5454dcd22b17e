"""A run's folder, seen: a page that opens offline, comparisons, a live view. No torch.

May import disk, record and stats.
"""
