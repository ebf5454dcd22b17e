"""Terms of the formula on tensors: loss, optimizer, reduction. Numbers, no config.

May import data.
"""
