"""Small grids of runs that test a claim. No torch.

May import verify, replay, report and above.
"""
