"""Norms of adapter matrices beside a healthy update's or other layers'.

Legend: A (R, in) and B (out, R) of an adapter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from glassloop.formula.optim import l2_norm
from glassloop.replay.replica import Parts

MATRIX = re.compile(r"layers\.(\d+)\.(?:\w+\.)*?(\w+)\.lora_([AB])\.")


@dataclass(frozen=True)
class MatrixStat:
    """One adapter matrix; factors are over the reference.

    A factor is None if the reference is 0 or unknown.
    """

    layer: int
    projection: str
    side: str  # "A" | "B"
    grad_norm: float
    weight_norm: float
    grad_factor: float | None
    weight_factor: float | None

    @property
    def name(self) -> str:
        return f"layer {self.layer} {self.projection} {self.side}"


def norms(parts: Parts) -> list[MatrixStat]:
    """Norms of every adapter matrix of a numbered layer, gradients unscaled."""
    stats = []
    for name, place in parts.replica.adapters.slices.items():
        if (found := MATRIX.search(name)) is not None:
            weight, grad = (
                l2_norm(place.of(flat)).item()
                for flat in (parts.replica.adapters.flat.data, parts.replica.adapters.grad)
            )
            stats.append(
                MatrixStat(
                    int(found[1]),
                    found[2],
                    found[3],
                    grad / parts.replica.scale.value,
                    weight,
                    None,
                    None,
                )
            )
    return stats


def compare(
    stats: Sequence[MatrixStat], healthy: Sequence[MatrixStat] | None
) -> tuple[MatrixStat, ...]:
    """The stats with their factors.

    Over the healthy update's own, after division by what most matrices of that side grew by: B
    starts at 0 and grows in every layer, and a larger loss raises every gradient. The lower
    quartile stands for most, so that one layer of two cannot hide. Without a healthy update: over
    the median of the same projection and side in the other layers.
    """
    if healthy is None:
        return tuple(
            replace(
                s,
                weight_factor=over(
                    s.weight_norm, _middle([o.weight_norm for o in stats if _same_elsewhere(o, s)])
                ),
                grad_factor=over(
                    s.grad_norm, _middle([o.grad_norm for o in stats if _same_elsewhere(o, s)])
                ),
            )
            for s in stats
        )
    before = {(h.layer, h.projection, h.side): h for h in healthy}
    grown = []
    for s in stats:
        h = before.get((s.layer, s.projection, s.side))
        weight, grad = (
            (None, None)
            if h is None
            else (over(s.weight_norm, h.weight_norm), over(s.grad_norm, h.grad_norm))
        )
        grown.append(replace(s, weight_factor=weight, grad_factor=grad))
    result = []
    for s in grown:
        weight, grad = (
            _most([getattr(o, field) for o in grown if o.side == s.side])
            for field in ("weight_factor", "grad_factor")
        )
        result.append(
            replace(
                s,
                weight_factor=None if s.weight_factor is None else over(s.weight_factor, weight),
                grad_factor=None if s.grad_factor is None else over(s.grad_factor, grad),
            )
        )
    return tuple(result)


def _same_elsewhere(a: MatrixStat, b: MatrixStat) -> bool:
    return (a.projection, a.side) == (b.projection, b.side) and a.layer != b.layer


def _middle(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return median(finite) if finite else 0.0


def _most(factors: Sequence[float | None]) -> float:
    """Lower quartile of the factors that are numbers, or 0."""
    known = sorted(factor for factor in factors if factor is not None and math.isfinite(factor))
    return known[len(known) // 4] if known else 0.0


def over(value: float, reference: float) -> float | None:
    return value / reference if reference > 0 else None
