"""A training loop for LoRA on 4-bit models.

It shows every term of every update.
"""

import logging

__version__ = "0.1.0"

# PEFT imports bitsandbytes, which warns of an inference kernel for CPUs that training never uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
