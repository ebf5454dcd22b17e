"""Memory of models that nothing uses any more."""

from __future__ import annotations

import gc

import torch


def free_dropped(device: torch.device) -> None:
    """Free what was dropped on a card.

    A model is a ring of references, which stays until garbage is collected. What is freed counts as
    taken until torch gives it back.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
