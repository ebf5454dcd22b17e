"""Quantities of a run, each with a unit.

Every number is one that the run recorded.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from glassloop.record.reading import RunData, number, setting
from glassloop.report.compare_text import tokens_per_s
from glassloop.report.payload import memory
from glassloop.stats import fit

SPIKES = {"norm_spike", "loss_spike"}
# times the first update's loss: a run that ends above has lost what it knew, whatever the scatter
# of single windows
RAISED = 1.1


@dataclass(frozen=True)
class Quantity:
    """A number of a run; None if it has none."""

    measure: str  # which of a study's measures it belongs to
    unit: str
    words: str
    of: Callable[[RunData], float | None]


def _heldout(run: RunData) -> list[float]:
    """Held-out losses in order of their updates, from before the first one."""
    return [loss for one in run.evaluations if (loss := number(one["loss_nats"])) is not None]


def heldout_loss(run: RunData) -> float | None:
    last = run.evaluations[-1] if run.evaluations else None
    return (
        number(last["loss_nats"])
        if last is not None and last["update"] == run.planned_updates
        else None
    )


def heldout_gain(run: RunData) -> float | None:
    last = heldout_loss(run)
    return None if last is None or run.evaluations[0]["update"] != 0 else _heldout(run)[0] - last


def heldout_rise(run: RunData) -> float | None:
    last = heldout_loss(run)
    return None if last is None else last - min(_heldout(run))


def train_loss(run: RunData) -> float | None:
    """Mean of the last fifth of the updates, weighted by their tokens."""
    losses = [
        (number(one["loss_nats"]), one["supervised_tokens"])
        for one in run.updates
        if one["loss_nats"] is not None
    ]
    last = [
        (loss, tokens) for loss, tokens in losses[-max(1, len(losses) // 5) :] if loss is not None
    ]
    tokens = sum(count for _, count in last)
    return sum(loss * count for loss, count in last) / tokens if tokens else None


def overfit_gap(run: RunData) -> float | None:
    heldout, train = heldout_loss(run), train_loss(run)
    return None if heldout is None or train is None else heldout - train


def _norms(run: RunData) -> list[tuple[int, float]]:
    """(update, norm before clipping) of the sound updates after warmup."""
    warmup = setting(run.config, "schedule.warmup_updates") or 0
    found = [
        (one["update"], number(one["grad_norm_pre_clip"]))
        for one in run.updates
        if one["update"] > warmup
    ]
    return [
        (update, norm)
        for update, norm in found
        if norm is not None and math.isfinite(norm) and norm > 0
    ]


def norm_median(run: RunData) -> float | None:
    norms = _norms(run)
    return statistics.median(norm for _, norm in norms) if norms else None


def norm_scatter(run: RunData) -> float | None:
    """Return the scatter of log(norm) around its own trend.

    It is a standard deviation.
    """
    norms = _norms(run)
    if len(norms) < 4:
        return None
    return fit([update for update, _ in norms], [math.log(norm) for _, norm in norms]).sigma


def norm_peak(run: RunData) -> float | None:
    norms = _norms(run)
    return (
        max(norm for _, norm in norms) / statistics.median(norm for _, norm in norms)
        if norms
        else None
    )


def spikes(run: RunData) -> float | None:
    return (
        float(sum(bool(SPIKES & set(one.get("alarms") or ())) for one in run.updates))
        if run.updates
        else None
    )


def clip_share(run: RunData) -> float | None:
    clips = [clip for one in run.updates if (clip := number(one["clip_coef"])) is not None]
    return sum(clip < 1 for clip in clips) / len(clips) if clips else None


def noise_scale(run: RunData) -> float | None:
    """Return the median over the second half of the updates.

    The smoothed estimate has settled there.
    """
    half = run.planned_updates / 2
    values = [number(one.get("noise_scale_tokens")) for one in run.updates if one["update"] > half]
    known = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.median(known) if known else None


def update_ratio(run: RunData) -> float | None:
    values = [number(probe.get("all_update_to_weight")) for probe in run.probes if probe["applied"]]
    known = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.median(known) if known else None


def first_bad(run: RunData) -> int | None:
    """Return the first update that is not finite or skipped.

    An update without supervised tokens does not count. None if all are sound.
    """
    for one in run.updates:
        values = (number(one["loss_nats"]), number(one["grad_norm_pre_clip"]))
        broken = any(value is not None and not math.isfinite(value) for value in values)
        if broken or (one["action"] == "skipped" and one["supervised_tokens"]):
            return int(one["update"])
    return None


def diverged(run: RunData) -> float | None:
    """Return 1.0 if training diverged, else 0.0.

    It did if a number was not finite, or the last fifth's training loss lies RAISED above the first
    update's.
    """
    if not run.updates:
        return None
    first, last = number(run.updates[0]["loss_nats"]), train_loss(run)
    return float(
        first_bad(run) is not None or last is None or first is None or not last <= RAISED * first
    )


def _phase(name: str) -> Callable[[RunData], float | None]:
    def measured(run: RunData) -> float | None:
        found = memory(run.events)
        return None if found is None else (found["phases"].get(name) or (None, None))[1]

    return measured


def peak_gib(run: RunData) -> float | None:
    """Return the largest allocation of any rank; None without GPU."""
    peaks = run.updates[-1]["rank_peak_gib"] if run.updates else None
    return max(peaks) if peaks else None


def update_s(run: RunData) -> float | None:
    later = [one["update_s"] for one in run.updates[1:]]
    return statistics.median(later) if later else None


def rows_seen(run: RunData) -> float | None:
    return (
        float(sum(one["rows"] for one in run.updates if one["action"] == "applied"))
        if run.updates
        else None
    )


QUANTITIES = {
    "heldout_loss": Quantity(
        "loss", "nats a token", "held-out loss after the last update", heldout_loss
    ),
    "heldout_gain": Quantity(
        "loss", "nats a token", "how far held-out loss fell from the base's", heldout_gain
    ),
    "heldout_rise": Quantity(
        "loss", "nats a token", "held-out loss at the end above its lowest in the run", heldout_rise
    ),
    "train_loss": Quantity(
        "loss", "nats a token", "training loss of the last fifth of the updates", train_loss
    ),
    "overfit_gap": Quantity(
        "loss", "nats a token", "held-out loss less training loss, at the end", overfit_gap
    ),
    "norm_median": Quantity(
        "stability", "L2, before clipping", "middle gradient norm after warmup", norm_median
    ),
    "norm_scatter": Quantity(
        "stability",
        "of the logarithm",
        "scatter of the gradient norm around its trend",
        norm_scatter,
    ),
    "norm_peak": Quantity(
        "stability", "times", "largest gradient norm over the middle one", norm_peak
    ),
    "spikes": Quantity("stability", "updates", "alarms for norm or loss", spikes),
    "clip_share": Quantity("stability", "share", "updates that were clipped", clip_share),
    "noise_scale": Quantity(
        "stability", "supervised tokens", "gradient noise scale, second half", noise_scale
    ),
    "update_ratio": Quantity(
        "stability", "ratio", "update / weight of all adapters, middle", update_ratio
    ),
    "diverged": Quantity(
        "stability", "0 or 1", "not finite, or training loss ended 10 % above its start", diverged
    ),
    "load_gib": Quantity("memory", "GiB", "GPU memory once the base is loaded", _phase("load")),
    "adapters_gib": Quantity(
        "memory", "GiB", "GPU memory with adapters and their gradients", _phase("adapters")
    ),
    "peak_gib": Quantity("memory", "GiB", "largest GPU allocation of the run", peak_gib),
    "update_s": Quantity("time", "s", "middle time of an update", update_s),
    "tokens_per_s": Quantity("time", "real tokens/s", "real tokens a second, middle", tokens_per_s),
    "rows_seen": Quantity("loss", "rows", "rows that were trained on, repeats counted", rows_seen),
}


def measured(run: RunData) -> dict[str, float | None]:
    """Every quantity of a run."""
    return {name: quantity.of(run) for name, quantity in QUANTITIES.items()}
