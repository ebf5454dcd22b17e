"""What an update shows and what all ranks decide: detectors, probes, noise scale.

May import formula, data, record and stats.
"""
