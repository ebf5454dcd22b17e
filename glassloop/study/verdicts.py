"""Judge a claim: supported, contradicted, or not resolved.

The difference is taken seed by seed: a seed decides rows, their order and the first adapters, so
two cells of one seed share most of their chance. Of the n differences d_s the 95 % interval is mean
+- t(0.975, n - 1) * s / sqrt(n), Student's paired interval (W. S. Gosset, Biometrika 6, 1908).

    higher  supported: the interval lies above `by`        contradicted: it lies below `by`
    lower   supported: it lies below -`by`                 contradicted: it lies above -`by`
    about   supported: it lies within `value` +- `within`  contradicted: it lies outside, one side

Everything else, and every claim with fewer than two seeds, is not resolved. So "contradicted" may
mean the opposite, or an effect that is shown to be smaller than the claim is worth.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glassloop.stats import student_quantile
from glassloop.study.claims import Claim
from glassloop.study.quantities import QUANTITIES
from glassloop.study.results import Group

SUPPORTED, CONTRADICTED, UNRESOLVED = "supported", "contradicted", "not resolved"
SHARE = 0.975


@dataclass(frozen=True)
class SeedPair:
    """One seed's two values, and their difference in the claim's scale."""

    seed: int
    value: float
    against: float
    difference: float


@dataclass(frozen=True)
class Judged:
    """A claim with its verdict.

    difference, low, high: mean and 95 % interval; None with too few seeds.
    """

    claim: Claim
    verdict: str
    why: str
    pairs: tuple[SeedPair, ...]
    difference: float | None
    low: float | None
    high: float | None


def judge(claim: Claim, groups: Sequence[Group], seeds: Sequence[int]) -> Judged:
    """Judge a claim on pairs by seed.

    Axes that the claim leaves open are averaged over, if all their settings have a value.
    """
    pairs: list[SeedPair] = []
    without: list[int] = []
    for seed in seeds:
        value = _value(claim.quantity, claim.cell, groups, seed)
        against = (
            claim.against
            if isinstance(claim.against, float | int)
            else _value(claim.quantity, claim.against, groups, seed)
        )
        if value is None or against is None or (claim.scale == "share" and against == 0):
            without.append(seed)
            continue
        difference = (value - against) / (abs(against) if claim.scale == "share" else 1.0)
        pairs.append(SeedPair(seed, value, float(against), difference))
    verdict, why, found = decide(claim, [pair.difference for pair in pairs])
    missing = (
        f"; without a finite value of both: seed {', '.join(map(str, without))}" if without else ""
    )
    return Judged(claim, verdict, why + missing, tuple(pairs), *(found or (None, None, None)))


def decide(
    claim: Claim, differences: Sequence[float]
) -> tuple[str, str, tuple[float, float, float] | None]:
    """(verdict, reason in words, (mean, low, high)) of the seeds' differences."""
    if len(differences) < 2:
        alone = f" ({told(claim, differences[0])})" if differences else ""
        return (
            UNRESOLVED,
            f"{len(differences)} seed{'' if len(differences) == 1 else 's'} with both "
            f"values{alone}: nothing tells how far seeds alone part",
            None,
        )
    mean, half = interval(differences)
    low, high = mean - half, mean + half
    other = f" from {claim.against:g}" if isinstance(claim.against, float | int) else ""
    words = (
        f"difference{other} {told(claim, mean)}, 95 % interval {told(claim, low)} to "
        f"{told(claim, high)}, {len(differences)} seeds"
    )
    if claim.expect == "about":
        bottom, top = claim.value - claim.within, claim.value + claim.within
        supported, contradicted = bottom <= low and high <= top, high < bottom or low > top
        bound = f"{told(claim, bottom)} to {told(claim, top)}"
    else:
        sign = 1 if claim.expect == "higher" else -1
        ends = sorted((sign * low, sign * high))
        supported, contradicted = ends[0] > claim.by, ends[1] < claim.by
        bound = (
            f"{'more' if sign > 0 else 'less'} than "
            f"{told(claim, sign * claim.by) if claim.by else 0}"
        )
    verdict = SUPPORTED if supported else CONTRADICTED if contradicted else UNRESOLVED
    return verdict, f"claimed {bound}; {words}", (mean, low, high)


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return (mean, half its 95 % interval) of two differences or more."""
    n = len(differences)
    return statistics.fmean(differences), student_quantile(SHARE, n - 1) * statistics.stdev(
        differences
    ) / math.sqrt(n)


def told(claim: Claim, difference: float) -> str:
    """A difference with its unit."""
    return f"{100 * difference:+.3g} %" if claim.scale == "share" else f"{difference:+.4g}"


def as_plain(judged: Judged) -> dict[str, Any]:
    """Plain JSON."""
    claim = judged.claim
    return {
        "says": claim.says,
        "verdict": judged.verdict,
        "why": judged.why,
        "quantity": claim.quantity,
        "unit": "share" if claim.scale == "share" else QUANTITIES[claim.quantity].unit,
        "cell": dict(claim.cell),
        "against": claim.against if isinstance(claim.against, float | int) else dict(claim.against),
        "expect": claim.expect,
        "by": claim.by,
        "value": claim.value,
        "within": claim.within,
        "difference": judged.difference,
        "low": judged.low,
        "high": judged.high,
        "pairs": [vars(pair) for pair in judged.pairs],
    }


def _value(
    quantity: str, selected: Mapping[str, str], groups: Sequence[Group], seed: int
) -> float | None:
    """Return the mean over the selected groups.

    None if one of them lacks the seed or its value is not finite.
    """
    chosen = [
        group
        for group in groups
        if all(group.settings.get(axis) == label for axis, label in selected.items())
    ]
    values = [group.spread(quantity).by_seed.get(seed) for group in chosen]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None
