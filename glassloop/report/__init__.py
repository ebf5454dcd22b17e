"""Reports of a run: page, comparisons, live view. No torch.

May import disk, record and stats.
"""
