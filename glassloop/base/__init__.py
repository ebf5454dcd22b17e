"""The frozen base: where its files are, its quantised forms, drawn weights, checks.

May import config, predict and disk.
"""
