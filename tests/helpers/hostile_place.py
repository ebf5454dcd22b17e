"""What hostile inputs are tried on, and what a case is."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HARM = b"\x80\x04" + pickle.dumps(os.getcwd)[2:]  # a pickle that names a function


@dataclass(frozen=True)
class Place:
    """What the inputs are tried on."""

    folder: Path
    model: Path
    tokenizer: Any
    run: Any  # two updates done, a checkpoint and a capsule saved


# What is given -> what became of it, unless it is refused with a ValueError.
Case = tuple[str, Callable[[Place], str]]
