"""A check that all ranks run one program, before anything is built.

It compares code, config and libraries.

Ranks that differ would train together all the same, on gradients of different formulas.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import glassloop
from glassloop.config import Config, as_dict
from glassloop.disk.environment import package_version
from glassloop.disk.secrets import without_secrets
from glassloop.formula.dist import gather_objects, is_distributed

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "triton", "numpy")
MORE = ("unsloth", "unsloth_zoo", "flash-attn", "safetensors", "tokenizers", "datasets")
# Where things lie may differ by host. What is read there is compared by its content: rows, base
# and checkpoint by digests, new adapters by rank 0's, which all ranks take.
PLACES = (
    "data.heldout",
    "data.source",
    "model.cache_dir",
    "model.id",
    "model.init_adapter",
    "resume.run",
    "run.dir",
    "run.name",
)
CURE = "install one version on every host, and start all ranks with one command"
ABSENT = "nothing"
SHOWN = 12  # differences that a message names


def require_same_program(config: Config) -> None:
    """Raise ValueError on every rank unless all run one program.

    They compare code, config and libraries.

    One small gather; where it finds a difference, a second one names it.
    """
    if not is_distributed():
        return
    mine = program(config)
    digests = gather_objects({part: _digest(values) for part, values in mine.items()})
    if older := [str(rank) for rank, held in enumerate(digests) if not isinstance(held, dict)]:
        raise ValueError(
            f"rank {', '.join(older)} runs an older glassloop than this one, which compares no "
            f"programs: {CURE}"
        )
    differing = [part for part in mine if len({held.get(part) for held in digests}) > 1]
    if differing:
        raise ValueError(difference(gather_objects({part: mine[part] for part in differing})))


def program(config: Config) -> dict[str, dict[str, str]]:
    """What must be equal on all ranks: part -> name -> value."""
    package = Path(glassloop.__file__).parent
    files = [*sorted(package.rglob("*.py")), package.parent / "train_loop.py"]
    return {
        "code": {
            str(path.relative_to(package.parent)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
            if path.is_file()
        },
        "config": {
            name: value for name, value in _leaves(as_dict(config)).items() if name not in PLACES
        },
        "libraries": {
            "python": platform.python_version(),
            **{name: package_version(name) or ABSENT for name in (*LIBRARIES, *MORE)},
        },
    }


def difference(details: list[dict[str, dict[str, str]]]) -> str:
    """What the ranks' programs differ in, with the value of each rank.

    Args:
        details: by rank, part -> name -> value of the parts that differ.
    """
    lines = []
    for part in details[0]:
        of_ranks = [one.get(part, {}) for one in details]
        for name in dict.fromkeys(name for values in of_ranks for name in values):
            held: dict[str, list[int]] = {}
            for rank, values in enumerate(of_ranks):
                held.setdefault(str(values.get(name, ABSENT)), []).append(rank)
            if len(held) > 1:
                lines.append(f"  {name}: " + "; ".join(_of_ranks(part, held)))
    more = [f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join(
        [
            "ranks run different programs, so they would train on different formulas:",
            *lines[:SHOWN],
            *more,
            CURE,
        ]
    )


def _of_ranks(part: str, held: Mapping[str, list[int]]) -> list[str]:
    """Each value with the ranks that have it."""
    told = []
    for value, ranks in held.items():
        shown = f"sha256 {value[:12]}" if part == "code" and value != ABSENT else value
        who = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        told.append(f"{who}: {without_secrets(shown)}")
    return told


def _leaves(tree: Any, name: str = "") -> dict[str, str]:
    """Fields of a config ("lora.r") with their values as text."""
    if isinstance(tree, dict) and tree:
        return {
            field: value
            for key, branch in tree.items()
            for field, value in _leaves(branch, f"{name}.{key}".lstrip(".")).items()
        }
    return {name: json.dumps(tree, default=str)}


def _digest(values: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
