"""A recorded update computed again: does it reproduce, what stands out, what changes it.

May import train_loop and what stands above it.
"""
