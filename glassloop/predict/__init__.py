"""Bytes, FLOPs and seconds from shapes alone. No torch.

May import nothing of ours.
"""
