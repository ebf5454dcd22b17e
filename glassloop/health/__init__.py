"""Read-only checks on an update, and the decision of all ranks.

Detectors, probes, noise scale. May import config, data, formula, record and stats.
"""
