"""Gradient noise scale: supervised tokens beyond which more stop helping much.

After McCandlish et al. 2018, "An Empirical Model of Large-Batch Training" (arXiv:1812.06162),
appendix A, for parts of unequal size.

Let each supervised token have a gradient with mean G and covariance Sigma. An update has N tokens
in P parts (ranks, or the halves of a window); part p has n_p of them, and its share of the update's
gradient is s_p = sum of its tokens' gradients / N, so that g = sum of s_p. The part's own mean
gradient is m_p = s_p N / n_p. Then

    E |m_p|^2 = |G|^2 + tr(Sigma) / n_p          E |g|^2 = |G|^2 + tr(Sigma) / N

    E [ sum_p n_p |m_p - g|^2 ]  =  E [ sum_p n_p |m_p|^2 - N |g|^2 ]  =  (P - 1) tr(Sigma)

because sum_p n_p m_p = N g. With n_p |m_p|^2 = N^2 |s_p|^2 / n_p this gives two estimates without
bias out of numbers that an update has anyway:

    tr(Sigma) ~ within = (sum_p N^2 |s_p|^2 / n_p - N |g|^2) / (P - 1)
    |G|^2     ~ |g|^2 - within / N

Weighting by n_p is what makes ragged parts right. Each estimate is noisy and their ratio is biased,
so both are smoothed first and divided then: B_simple = tr(Sigma) / |G|^2, in supervised tokens. The
tokens of a row are not independent of each other, rows are: the number is then larger than for
independent tokens by the same factor by which windows are noisier, and stays the right one to
compare with N.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

DECAY = 0.95  # of the exponential means: the last 20 updates carry 64 % of the weight


def estimates(
    part_norms: Sequence[float], part_tokens: Sequence[int], norm: float
) -> tuple[float, float] | None:
    """Estimate (tr(Sigma) of one token, |G|^2) from one update.

    Both are without bias; either may come out negative.

    Args:
        part_norms: |s_p|, each part's share of g, before clipping and without fp16's loss scale.
        part_tokens: n_p, supervised tokens. Parts without any are left out.
        norm: |g|.

    Returns None if fewer than two parts have tokens, or a number is not finite: the update says
    nothing.
    """
    parts = [
        (share, tokens) for share, tokens in zip(part_norms, part_tokens, strict=True) if tokens > 0
    ]
    if len(parts) < 2 or not all(map(math.isfinite, (norm, *(share for share, _ in parts)))):
        return None
    n = sum(tokens for _, tokens in parts)  # N
    within = (sum(n * n * share * share / tokens for share, tokens in parts) - n * norm * norm) / (
        len(parts) - 1
    )
    return within, norm * norm - within / n


class NoiseScale:
    """The two estimates, smoothed over updates, and their ratio."""

    def __init__(self, decay: float = DECAY) -> None:
        """decay: weight that the past keeps at each update, in [0, 1)."""
        if not 0 <= decay < 1:
            raise ValueError(
                f"decay = {decay}: must be at least 0 and less than 1 (for example {DECAY})"
            )
        self.decay = decay
        self.within = (
            0.0  # sums with the same weights: their ratio needs no correction for the start at 0
        )
        self.squared = 0.0
        self.updates = 0  # that were counted

    def add(self, part_norms: Sequence[float], part_tokens: Sequence[int], norm: float) -> None:
        """Add one update; one that says nothing changes nothing.

        Arguments as in `estimates`.
        """
        found = estimates(part_norms, part_tokens, norm)
        if found is None:
            return
        within, squared = found
        self.within = self.decay * self.within + (1 - self.decay) * within
        self.squared = self.decay * self.squared + (1 - self.decay) * squared
        self.updates += 1

    @property
    def tokens(self) -> float | None:
        """B_simple in supervised tokens, or None.

        None before the first update, and while a smoothed estimate is not above 0 (noise drowns G).
        """
        return self.within / self.squared if self.squared > 0 and self.within > 0 else None

    def state(self) -> dict[str, Any]:
        """Plain JSON, for a checkpoint."""
        return {"within": self.within, "squared": self.squared, "updates": self.updates}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore `state()`. Raises ValueError, and changes nothing, if it is malformed."""
        try:
            within, squared, updates = (
                float(state["within"]),
                float(state["squared"]),
                int(state["updates"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"noise scale: state {state!r} is malformed ({error!r}); leave it out to start anew"
            ) from None
        if not math.isfinite(within) or not math.isfinite(squared) or updates < 0:
            raise ValueError(
                f"noise scale: state {state!r} is not finite; leave it out to start anew"
            )
        self.within, self.squared, self.updates = within, squared, updates
