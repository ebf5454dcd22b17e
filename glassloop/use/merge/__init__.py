"""Merging of adapters into 16-bit weights: cost and serving."""
