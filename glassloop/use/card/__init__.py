"""The model card of a run, and its upload."""
