"""The state of a run between two updates: a checkpoint's state.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from safetensors import SafetensorError

SCHEMA = 1  # raised when a field changes its meaning; older ones open
STATE = "state.json"
KINDS = {"int": int, "float": (int, float), "str": str, "dict": dict}


@dataclass(frozen=True)
class RunState:
    """The state of a run between two updates, in plain JSON types."""

    update: int
    """Windows that are done, skipped ones included; the next one is update + 1."""
    epoch: int
    """0-based pass over the rows that the last window belonged to."""
    world_size: int
    """Ranks that saved it."""
    base_hash: str
    """Of the frozen base's bytes; another base is refused."""
    config: dict[str, Any]
    """The whole config."""
    versions: dict[str, str] = field(default_factory=dict)
    """Version of each package."""
    attempt: int = 1
    """Of the updates that this process does, as in their records."""
    loss_scale: float = 1.0
    """fp16: the factor on the next update's loss; 1 otherwise."""
    finite_updates: int = 0
    """fp16: finite updates in a row since the factor last changed."""
    heldout_loss_nats: float | None = None
    """Token mean over held-out rows with these weights. None if it is unknown or not finite."""
    tracker_ids: dict[str, str] = field(default_factory=dict)
    """Id of the run in each tracker."""
    details: dict[str, Any] = field(default_factory=dict)
    """Detector windows, noise scale, windows left out, halvings of passes, memory tiers, the course
    of held-out loss."""
    serial: int = 0
    """Counts up: the checkpoint saved last has the highest in its folder."""
    schema: int = SCHEMA
    """Version of the file."""


def parsed(contents: dict[str, bytes], name: str, parse: Callable[[bytes], Any]) -> Any:
    """A file's content, parsed. Raises ValueError naming the file."""
    try:
        return parse(contents[name])
    except (ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{name} does not fit: {error}") from error


def state_from(contents: dict[str, bytes]) -> RunState:
    """Read the state in state.json.

    Raises ValueError naming a field that is missing, unknown or odd.
    """
    plain = parsed(contents, STATE, json.loads)
    if not isinstance(plain, dict) or not isinstance(plain.get("schema"), int):
        raise ValueError(f"{STATE} is malformed: it says no schema")
    if plain["schema"] > SCHEMA:
        raise ValueError(
            f"{STATE} has schema {plain['schema']} and this glassloop reads up to {SCHEMA}: "
            "install a newer one"
        )
    plain.pop("order_seed", None)  # older checkpoints have it; config["seed"] says the same
    known = {f.name: f for f in dataclasses.fields(RunState)}
    needed = {
        name for name, f in known.items() if f.default is f.default_factory is dataclasses.MISSING
    }
    if odd := (needed - plain.keys()) | (plain.keys() - known.keys()):
        raise ValueError(f"{STATE} is malformed: missing or unknown: {', '.join(sorted(odd))}")
    for name, value in plain.items():
        kind, _, rest = str(known[name].type).partition(" ")
        none = value is None and rest == "| None"
        if not none and not isinstance(value, KINDS[kind.partition("[")[0]]):
            raise ValueError(f"{STATE} is malformed: {name} is {value!r}")
    return RunState(**plain)
