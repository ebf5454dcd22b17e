"""Bytes, FLOPs and seconds from shapes alone. No torch.

Imports no other room.
"""
