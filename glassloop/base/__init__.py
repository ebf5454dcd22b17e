"""The frozen base: its source, quantised forms, drawn weights and checks.

May import config, disk and predict.
"""
