"""The environment of a process that doctor starts to try something out."""

from __future__ import annotations

import os
from pathlib import Path


def environment_of_child(**more: str) -> dict[str, str]:
    """This process's environment, in which Python finds this very glassloop."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *([os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else [])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}
