"""Engines that compute a pass.

The reference over PEFT, Unsloth, and our own in fused/. May import base, config, data, disk,
formula, plan and predict.
"""
