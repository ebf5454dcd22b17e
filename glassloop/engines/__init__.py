"""Engines that compute a pass: over PEFT, by Unsloth, our own in fused/.

May import base, data, formula, plan and predict.
"""
