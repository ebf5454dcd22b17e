"""Find where two runs differ first, in input and output."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

from glassloop.record.reading import RunData, number

# Of an update; everything else comes out of it.
GOES_IN = ("learning rate", "rows", "supervised tokens")


@dataclass(frozen=True)
class Parting:
    """The first number in which two runs differ beyond the floor.

    First means: in the order in which an update is computed.
    """

    update: int
    rank: int | None  # None: a number of all ranks together
    quantity: str
    a: Any
    b: Any
    off: float | None  # relative difference; None for what is no number


def first_partings(
    a: RunData, b: RunData, floor: float
) -> tuple[int, Parting | None, Parting | None]:
    """Return (common updates, first difference of input, of output).

    Ranks are compared if both runs have equally many.
    """
    of_b = {record["update"]: record for record in b.updates}
    rows_a, rows_b = _rows_by_rank(a), _rows_by_rank(b)
    compared = 0
    first: dict[bool, Parting] = {}  # by whether it is something that goes in
    for one in a.updates:
        update = one["update"]
        if (two := of_b.get(update)) is None:
            continue
        compared += 1
        for rank, name, x, y in _in_order(one, two, rows_a.get(update), rows_b.get(update)):
            off = relative_difference(x, y)
            if (name in GOES_IN) not in first and (off is None or off > floor):
                first[name in GOES_IN] = Parting(
                    update, rank, name, x, y, off if off is None or math.isfinite(off) else None
                )
    return compared, first.get(True), first.get(False)


def _in_order(
    one: dict[str, Any], two: dict[str, Any], rows_a: Any, rows_b: Any
) -> list[tuple[int | None, str, Any, Any]]:
    """List (rank, quantity, value, other value), causes before effects."""
    pairs: list[tuple[int | None, str, Any, Any]] = [
        (None, "learning rate", number(one["lr"]), number(two["lr"]))
    ]
    ranks = (
        range(len(one["rank_loss_nats"]))
        if len(one["rank_loss_nats"]) == len(two["rank_loss_nats"])
        else range(0)
    )
    if rows_a is not None and rows_b is not None:
        if ranks:
            pairs += [(r, "rows", _ids(rows_a.get(r)), _ids(rows_b.get(r))) for r in ranks]
        else:
            whole_a, whole_b = (
                _ids([row_id for ids in rows.values() for row_id in ids])
                for rows in (rows_a, rows_b)
            )
            pairs.append((None, "rows", whole_a, whole_b))
    pairs.append(
        (
            None,
            "supervised tokens",
            float(one["supervised_tokens"]),
            float(two["supervised_tokens"]),
        )
    )
    pairs += [
        (r, "loss", number(one["rank_loss_nats"][r]), number(two["rank_loss_nats"][r]))
        for r in ranks
    ]
    pairs.append((None, "loss", number(one["loss_nats"]), number(two["loss_nats"])))
    if one.get("rank_grad_norm") and two.get("rank_grad_norm"):
        pairs += [
            (r, "gradient norm", number(one["rank_grad_norm"][r]), number(two["rank_grad_norm"][r]))
            for r in ranks
        ]
    pairs.append(
        (
            None,
            "gradient norm",
            number(one["grad_norm_pre_clip"]),
            number(two["grad_norm_pre_clip"]),
        )
    )
    pairs.append((None, "clip coefficient", number(one["clip_coef"]), number(two["clip_coef"])))
    pairs.append((None, "what was done", one["action"], two["action"]))
    return pairs


def relative_difference(x: Any, y: Any) -> float | None:
    """Return a relative difference; None for other values that differ."""
    if x == y or (
        isinstance(x, float) and isinstance(y, float) and math.isnan(x) and math.isnan(y)
    ):
        return 0.0
    if not isinstance(x, float) or not isinstance(y, float):
        return None
    if not (math.isfinite(x) and math.isfinite(y)):
        return math.inf
    return abs(x - y) / max(abs(x), abs(y))


def _rows_by_rank(run: RunData) -> dict[int, dict[int, list[str]]]:
    found: dict[int, dict[int, list[str]]] = {}
    for row in run.rows:
        found.setdefault(row["update"], {}).setdefault(row["rank"], []).append(row["row_id"])
    return found


def _ids(ids: list[str] | None) -> str:
    ids = sorted(ids or [])
    return (
        ", ".join(ids[:6])
        + (f" and {len(ids) - 6} more" if len(ids) > 6 else "")
        + (f" (#{zlib.crc32(chr(10).join(ids).encode()):08x})" if len(ids) > 6 else "")
    )
