"""A recorded update computed again.

Whether it reproduces, what stands out, what changes it.

May import train_loop and above.
"""
