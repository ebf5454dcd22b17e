"""Save a model on whatever rank this is."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def save_pretrained_here(model: Any, folder: Path) -> None:
    """`model.save_pretrained(folder)` on whatever rank this is.

    transformers 5 writes on global rank 0 only and is silent on the others. A cache belongs to a
    host, and the first rank of a second host is not global rank 0. Raises RuntimeError if nothing
    was written all the same.
    """
    model.should_save_on_this_rank = lambda is_main_process: True
    try:
        model.save_pretrained(folder)
    finally:
        del model.should_save_on_this_rank
    if not (folder / "config.json").is_file():
        raise RuntimeError(f"transformers wrote no config.json into {folder}")
