"""Plans of a run: steps, contract, choice of engine, outlook.

May import config and predict. No torch.
"""
