"""What a run will take, from arithmetic alone: GPU facts, model shapes, memory by phase, time. Nothing here imports torch."""
