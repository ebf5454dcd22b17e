"""Numbers that moved between two outputs of `glassloop verify --json`.

Rounding may explain a move, or not.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1  # of the JSON
# Largest relative move that rounding explains: an order above what layouts of one version differ by
# (8-bit states amplify it).
ROUNDING = {
    "sgd loss_nats": 2e-6,
    "sgd grad_norm": 5e-6,
    "adamw_8bit loss_nats": 1e-5,
    "adamw_8bit grad_norm": 1e-4,
}


@dataclass(frozen=True)
class Move:
    """One number that is not the same."""

    name: str  # task, optimizer and quantity, update
    old: float | None
    new: float | None
    relative: float | None  # |new - old| / |old|; None if one of them is missing
    mark: float
    beyond_rounding: bool


def read(path: Path) -> dict[str, Any]:
    """Read an earlier output.

    Raises:
        ValueError: it is none, or is of another problem or schema.
    """
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--against {path} is not JSON ({error}): give a file that `glassloop verify --json` "
            "wrote"
        ) from None
    if not isinstance(old, dict) or "fingerprint" not in old:
        raise ValueError(
            f"--against {path} holds no fingerprint: give a file that `glassloop verify --json` "
            "wrote"
        )
    return old


def require_comparable(old: dict[str, Any], problem: str, path: Path) -> None:
    """Raise ValueError where the file speaks of another problem."""
    if (old.get("schema"), old.get("problem")) != (SCHEMA, problem):
        raise ValueError(
            f"--against {path} is of schema {old.get('schema')} and problem {old.get('problem')}, "
            f"this glassloop has {SCHEMA} and {problem}: make it anew, with this glassloop under "
            "the old versions"
        )


def moves(
    old: dict[str, list[float | None]],
    new: dict[str, list[float | None]],
    *,
    shared_only: bool = False,
) -> list[Move]:
    """Every number of two fingerprints that differs at all, in order.

    `shared_only`: leave out what one of them did not compute.
    """
    found = []
    for series in dict.fromkeys([*old, *new]):
        if shared_only and not (series in old and series in new):
            continue
        mark = ROUNDING[series.partition(" ")[2]]
        before, after = old.get(series) or [], new.get(series) or []
        for place in range(max(len(before), len(after))):
            a, b = (values[place] if place < len(values) else None for values in (before, after))
            if a == b:
                continue
            relative = (
                abs(b - a) / abs(a)
                if isinstance(a, float) and isinstance(b, float) and a != 0
                else None
            )
            found.append(
                Move(
                    f"{series} update {place + 1}",
                    a,
                    b,
                    relative,
                    mark,
                    relative is None or not relative <= mark,
                )
            )
    return found


def lines(found: list[Move], total: int, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines to print: changed versions, moves beyond rounding, the largest within it."""
    changed = [
        f"{name} {old['versions'].get(name)} -> {new['versions'].get(name)}"
        for name in dict.fromkeys([*old["versions"], *new["versions"]])
        if old["versions"].get(name) != new["versions"].get(name)
    ]
    said = [
        f"against   {', '.join(changed) or 'the same versions'}; {old['device']} then, "
        f"{new['device']} now"
    ]
    beyond = [move for move in found if move.beyond_rounding]
    for move in beyond:
        by = (
            "is missing on one side"
            if move.relative is None
            else f"moved by {move.relative:.1e} (rounding: {move.mark:.0e})"
        )
        said.append(f"{move.name}: {move.old!r} -> {move.new!r} {by}")
    within = max(
        (m for m in found if not m.beyond_rounding),
        key=lambda m: (m.relative or 0.0) / m.mark,
        default=None,
    )
    largest = "" if within is None else f", at most by {within.relative:.1e} ({within.name})"
    said.append(
        f"{len(beyond)} of {total} numbers moved beyond rounding; {len(found) - len(beyond)} "
        f"within it{largest}"
    )
    return said
