"""Findings of the detectors, in words and numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from glassloop.health.signals import LEAST_LOSS_NATS, Finding, Kind, Signals
from glassloop.stats import Forecast, fit

LEARNED_NATS = 0.1  # mean loss below which nothing is left to learn
LEAST_FALL = 0.05  # of the loss, over the updates that are looked at, in a run that learns


def spike(
    kind: Kind,
    what: str,
    value: float,
    signals: Signals,
    seen: Forecast,
    *,
    window_updates: int,
    rows_per_update: int,
) -> Finding:
    """A norm or loss that leapt out of its window.

    Args:
        what: the value in words. window_updates: in the window that gave the forecast.
        rows_per_update: of a whole window.
    """
    usual, chance = math.exp(seen.expected), seen.above
    tail = (
        f"; a tail of {signals.rows} of {rows_per_update} rows, allowed for"
        if signals.rows < rows_per_update
        else ""
    )
    message = (
        f"{what} is {value / usual:.3g} times the {usual:.4g} that the last {window_updates} "
        f"sound updates lead to expect: t = {seen.t:.3g} where they scatter by {seen.sigma:.1%}, "
        f"which a sound update reaches with chance {chance:.1g}{tail}"
    )
    details = {
        "value": value,
        "expected": usual,
        "sigma_log": seen.sigma,
        "t": seen.t,
        "degrees": seen.degrees,
        "chance": chance,
    }
    return Finding(kind, message, {**details, "window_updates": window_updates})


def no_gradient(signals: Signals) -> Finding:
    """A gradient of exactly 0 beside a loss."""
    message = (
        f"the gradient is exactly 0 and the loss {signals.loss_nats:.4g} nats a token: "
        "nothing reaches the adapters"
    )
    details = {"value": 0.0, "loss_nats": signals.loss_nats}
    return Finding("vanishing_gradient", message, details)


def vanished(signals: Signals, highest: float, updates: int) -> Finding:
    """A gradient far below what the run has had.

    Args:
        highest: level of log(norm / loss). updates: in a row that it has lasted.
    """
    usual = math.exp(highest) * max(signals.loss_nats, LEAST_LOSS_NATS)
    message = (
        f"gradient norm {signals.grad_norm:.4g} at a loss of {signals.loss_nats:.4g} nats a "
        f"token, {updates} updates in a row far below the {usual:.4g} that the run has had at "
        "its highest for such a loss"
    )
    details = {"value": signals.grad_norm, "expected": usual, "loss_nats": signals.loss_nats}
    return Finding("vanishing_gradient", message, details)


def diverged(signals: Signals, began: float, since: int, updates: int) -> Finding:
    """A loss that stays far above the one the run began with.

    Args:
        began: that loss, nats. since: first of the `updates` whole updates in a row.
    """
    message = (
        f"loss {signals.loss_nats:.4g} nats a token: since update {since}, {updates} whole "
        f"updates in a row, it has stood far above the {began:.4g} that the run began with; "
        f"training has diverged at lr = {signals.lr:.3g}, and a lower optimizer.lr or a longer "
        "warmup is the cure"
    )
    details = {"value": signals.loss_nats, "start_nats": began, "lr": signals.lr, "since": since}
    return Finding("diverged", message, details)


def not_learning(
    signals: Signals, losses: Sequence[tuple[int, float]], first: Sequence[float]
) -> Finding | None:
    """A loss that has not fallen, or None.

    None too if noise alone may hide that it has.

    Args:
        losses: (update, nats a token) of the last whole updates. first: of the run's first ones.
    """
    values = [loss for _, loss in losses]
    line = fit([update for update, _ in losses], values)
    updates = losses[-1][0] - losses[0][0]
    fall, error = -line.slope * updates, line.sigma / math.sqrt(line.spread) * updates
    newer = values[len(values) // 2 :]
    start = math.fsum(first) / len(first)
    since_start = start - math.fsum(newer) / len(newer)
    start_error = line.sigma * math.sqrt(1 / len(first) + 1 / len(newer))
    may_fall = fall > 0 or fall + 3 * error > LEAST_FALL * line.mean_y
    if line.mean_y < LEARNED_NATS or may_fall or since_start > start_error / 2:
        return None
    message = (
        f"the loss has not fallen over the {updates} updates to {signals.update}: by {fall:.3g} "
        f"+- {error:.2g} nats at a mean of {line.mean_y:.4g}, and it began at {start:.4g}, while "
        f"lr was above 0 (now {signals.lr:.3g})"
    )
    numbers = {
        "fall_nats": fall,
        "error_nats": error,
        "mean_nats": line.mean_y,
        "start_nats": start,
        "updates": updates,
    }
    return Finding("no_learning", message, numbers)
