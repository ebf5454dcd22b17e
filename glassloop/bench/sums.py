"""Sums of clocks and counters: the numbers of a line of results.

Pure functions, the same for every contender. No torch.
"""

from __future__ import annotations

import hashlib
import statistics
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from glassloop.data.rows import Row
from glassloop.predict.flops import Flops, flops_of
from glassloop.predict.shapes import Shapes
from glassloop.predict.tiers import Host

RECIPE_UPDATES = 60


@dataclass(frozen=True)
class Tokens:
    """Sum over all measured updates and ranks."""

    real: int
    supervised: int
    slot: int

    def per_s(self, seconds: float, ranks: int = 1) -> dict[str, float]:
        """Rate a second of all ranks, or of one of `ranks`."""
        return {name: value / seconds / ranks for name, value in vars(self).items()}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, 10th and 90th percentile (between the values), and the values."""
    tenths = (
        statistics.quantiles(values, n=10, method="inclusive")
        if len(values) > 1
        else [values[0]] * 9
    )
    return {
        "median": statistics.median(values),
        "p10": tenths[0],
        "p90": tenths[-1],
        "all": list(values),
    }


def times(
    launched: float | None, built: float, first_ended: float, seconds: Sequence[float]
) -> dict[str, Any]:
    """Seconds of the first update, the recipe and the measured updates.

    The first counts from the process's launch and from when all was built.

    launched: None if the process then waited for others, so that it says nothing.
    """
    further = (RECIPE_UPDATES - 1) * statistics.median(seconds)
    from_launch = None if launched is None else first_ended - launched
    return {
        "update_s": spread(seconds),
        "first_update_s": {"from_launch": from_launch, "from_built": first_ended - built},
        "recipe_s": {
            "updates": RECIPE_UPDATES,
            "from_launch": None if from_launch is None else from_launch + further,
            "from_built": first_ended - built + further,
            "how": "first update's end, then the median for each further one; without evaluations "
            "and "
            "checkpoints",
        },
    }


def turns_of(seconds: Sequence[float], real_tokens: Sequence[int]) -> list[dict[str, float]]:
    """Wall time and real tokens of every turn.

    `real_tokens`: of the measured updates, as many in every turn.
    """
    each = len(real_tokens) // len(seconds)
    return [
        {"seconds": one, "real_tokens": sum(real_tokens[turn * each : (turn + 1) * each])}
        for turn, one in enumerate(seconds)
    ]


def utilisation(
    shapes: Shapes,
    passes: Iterable[Sequence[Row]],
    *,
    packed: bool,
    r: int,
    targets: Sequence[str],
    checkpointing: bool,
    seconds: float,
    ranks: int,
    ceiling: float | None,
    kept: int | None = None,
    host: Host = "nothing",
) -> dict[str, Any]:
    """FLOPs a token, and a rank's share of the ceiling.

    mfu: with the FLOPs of real tokens. hfu: with padding and recomputation too.
    kept, host: layers that `fused` keeps whole, and what waits on the host of the others.
    """
    real, padded = [], []
    for rows in passes:
        widest = max(map(len, rows))
        real += [(len(row), row.supervised_tokens) for row in rows]
        padded += [(len(row) if packed else widest, row.supervised_tokens) for row in rows]
    how: dict[str, Any] = dict(
        r=r, targets=targets, checkpointing=checkpointing, kept=kept, host=host
    )
    needed, done = (flops_of(shapes, lengths, **how) for lengths in (real, padded))
    rate = needed.model / seconds / ranks
    executed = (done.model + done.recompute) / seconds / ranks
    return {
        "per_token": _per_token(needed, sum(length for length, _ in real)),
        "model_tflops_per_rank": rate / 1e12,
        "executed_tflops_per_rank": executed / 1e12,
        "ceiling_tflops": None if ceiling is None else ceiling / 1e12,
        "mfu": None if ceiling is None else rate / ceiling,
        "hfu": None if ceiling is None else executed / ceiling,
    }


def _per_token(flops: Flops, tokens: int) -> dict[str, float]:
    return {name: value / tokens for name, value in {**vars(flops), "model": flops.model}.items()}


def energy_of(
    joules: Sequence[float | None], during: dict[str, Any] | None, seconds: float, real_tokens: int
) -> dict[str, Any] | None:
    """Energy of the measured updates over all cards.

    `joules`: each rank's counter; `during`: a sampler's sum. None without both.
    """
    counted = [value for value in joules if value is not None]
    if len(counted) == len(joules):
        total, how = sum(counted), "NVML's energy counter"
    elif during is not None and during["power_w"] is not None:
        total, how = during["power_w"] * seconds * len(joules), "mean power draw of the first card"
    else:
        return None
    return {"joules": total, "how": how, "tokens_per_joule": real_tokens / total if total else None}


def digest_of(rows: Iterable[Row]) -> str:
    """16 hex digits that change with any row's ids or labels."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(array("i", row.input_ids).tobytes() + bytes(row.supervised))
    return digest.hexdigest()[:16]


def most(values: Iterable[float | None]) -> float | None:
    """The largest of those that exist."""
    return max((value for value in values if value is not None), default=None)
