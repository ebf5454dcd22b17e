"""What a run will do: steps, contract, choice of engine, outlook. No torch.

May import config and predict.
"""
