"""Adapters merged into 16-bit weights, what that costs, and how the result is served."""
