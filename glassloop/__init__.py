"""glassloop: a training loop for LoRA on 4-bit models that shows every term of every update."""

__version__ = "0.1.0"
