"""Merging of adapters into 16-bit weights: the cost, and commands to serve them."""
