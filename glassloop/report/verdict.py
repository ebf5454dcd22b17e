"""Judge two sides by the spread of their seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from glassloop.record.reading import RunData, setting
from glassloop.report.partings import Parting
from glassloop.stats import student_quantile


@dataclass(frozen=True)
class Side:
    """Runs that were asked the same thing, one a seed or more."""

    label: str  # "A", "B", ...
    runs: tuple[RunData, ...]

    @property
    def seeds(self) -> int:
        return len({setting(run.config, "seed") for run in self.runs})


def welch(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Return the means' difference b - a, and half its interval.

    Each side has two values or more.
    """
    va, vb = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    difference = statistics.fmean(b) - statistics.fmean(a)
    if va + vb == 0:
        return difference, 0.0
    degrees = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return difference, student_quantile(0.975, degrees) * math.sqrt(va + vb)


def verdict_of(
    first: Side,
    other: Side,
    scores_a: Sequence[float | None],
    scores_b: Sequence[float | None],
    parting: Parting | None,
    compared: int,
) -> tuple[str, str]:
    a = [score for score in scores_a if score is not None and math.isfinite(score)]
    b = [score for score in scores_b if score is not None and math.isfinite(score)]
    if len(a) < len(scores_a) or len(b) < len(scores_b):
        return "not resolved", "a run has no finite value to judge by"
    if parting is None and len(a) == len(b) == 1:
        return (
            "the same",
            f"no recorded number of {compared:,} updates differs beyond the noise floor",
        )
    if first.seeds < 2 or other.seeds < 2:
        few = " and ".join(side.label for side in (first, other) if side.seeds < 2)
        apart = f"{first.label} {statistics.fmean(a):.5g}, {other.label} {statistics.fmean(b):.5g}"
        return (
            "not resolved",
            f"one seed on side {few}, so nothing tells how far seeds alone part ({apart}); run "
            "each side with more seeds: seed=1, seed=2, ...",
        )
    difference, half = welch(a, b)
    words = (
        f"{other.label} - {first.label} = {difference:+.4g}, 95 % interval "
        f"{difference - half:+.4g} to {difference + half:+.4g}"
    )
    count = f"{len(a)} and {len(b)} runs"
    if abs(difference) <= half:
        return (
            "not resolved",
            f"the difference lies within the spread of the seeds: {words} ({count})",
        )
    lower = other.label if difference < 0 else first.label
    return f"{lower} is lower", f"beyond the spread of the seeds: {words} ({count})"
