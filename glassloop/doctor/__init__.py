"""Checks of a machine, and what known error messages mean.

May import engines and above.
"""
