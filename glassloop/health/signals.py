"""The numbers of an update that detectors compare, and what they find."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Kind = Literal["norm_spike", "loss_spike", "vanishing_gradient", "no_learning", "diverged"]

LEAST_LOSS_NATS = 1e-3  # below it the loss counts as 0 and the gradient may be 0 as well


@dataclass(frozen=True)
class Signals:
    """The numbers of an update that every rank knows before the step.

    All are finite: health.decision has checked that.
    """

    update: int
    lr: float
    rows: int  # of the window, over all ranks
    supervised_tokens: int  # N
    loss_nats: float  # global token mean
    grad_norm: float  # |g|, before clipping


@dataclass(frozen=True)
class Finding:
    """Something unusual about an update, in words and in numbers."""

    kind: Kind
    message: str
    details: dict[str, float | int] = field(default_factory=dict)


class Entry(NamedTuple):
    """A whole window that was taken in."""

    update: int
    log_norm: float
    log_loss: float


def entry_of(signals: Signals) -> Entry:
    """An update with a gradient, as the windows hold it."""
    return Entry(
        signals.update,
        math.log(signals.grad_norm or 1.0),
        math.log(max(signals.loss_nats, LEAST_LOSS_NATS)),
    )


def ratio(entry: Entry) -> float:
    """log(norm / loss)."""
    return entry.log_norm - entry.log_loss


def level(window: Sequence[Entry]) -> float:
    """Mean of log(norm / loss)."""
    return math.fsum(map(ratio, window)) / len(window)
