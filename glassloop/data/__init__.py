"""From a file to a Pass: sources, formats, templates, tokens, rows, batches.

May import config, disk and plan.
"""
