"""The frozen base: its source, quantised forms, drawn weights and checks.

May import config, predict and disk.
"""
