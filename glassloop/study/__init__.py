"""Small grids of runs that test a claim. No torch.

May import verify, report and what stands above them.
"""
