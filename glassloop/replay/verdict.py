"""The verdict on an update, from variations of it.

The verdict follows from stated rules, in this order. `Sound` is: finite, norm at most NORM_RANGE x
and loss at most LOSS_RANGE x the usual ones. Where no usual numbers are known, a trial is sound if
it is finite and the update as it was is not, or has NORM_RANGE x its norm or LOSS_RANGE x its loss.
`Harm` is a loss on the same rows that rises by more than RISE in the step.

    precision   the update as it was is not sound, in fp32 it is
    engine      it is not sound, with eager attention or the reference engine it is
    data        it is not sound, without the worst row it is, and that row stands out (see bisect)
    optimizer   it is sound but its step does harm, and a 32-bit AdamW's step does none
    lr          it is sound but its step does harm, and at half the lr at most half of it
    unresolved  nothing is out of range, or no trial helps
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

from glassloop.replay.bisect import Bisection

NORM_RANGE = 3.0
LOSS_RANGE = 1.5
RISE = 0.05
AS_IT_WAS, WITHOUT_ROW, FP32, EAGER, PEFT = (
    "as it was",
    "without the worst row",
    "fp32",
    "eager attention",
    "peft engine",
)
ADAMW, FRESH_ADAMW, HALF_LR = "32-bit AdamW", "32-bit AdamW, fresh moments", "half the lr"


@dataclass(frozen=True)
class Trial:
    """One variation of the update.

    None: it has no such number, or was not tried (`note` says why).
    """

    name: str
    loss_nats: float | None = None
    grad_norm: float | None = None  # before clipping
    clip_coef: float | None = None
    change: float | None = None  # L2 norm of what the step did to the adapters
    loss_after_nats: float | None = None  # of the same rows, after the step
    grad_off: float | None = None  # L2 distance of g from that of the update as it was, relative
    note: str = ""

    @property
    def finite(self) -> bool:
        numbers = (self.loss_nats, self.grad_norm)
        return all(number is not None and math.isfinite(number) for number in numbers)

    @property
    def rise(self) -> float:
        """Relative rise of the loss in the step; negative is progress.

        Infinite if the loss is not finite afterwards.
        """
        if self.loss_nats is None or self.loss_after_nats is None:
            return 0.0
        if not math.isfinite(self.loss_after_nats):
            return math.inf
        return (self.loss_after_nats - self.loss_nats) / max(abs(self.loss_nats), 1e-9)


@dataclass(frozen=True)
class Verdict:
    kind: str  # "data" | "precision" | "optimizer" | "engine" | "lr" | "unresolved"
    why: str
    earlier: bool = False  # the state that the update started from was off already


def worst_row(found: Bisection) -> int:
    """Index of the row that stands out, or of the largest gradient."""
    part = found.row or max(
        found.rows, key=lambda part: math.inf if not part.finite else part.grad_norm
    )
    assert part.row is not None
    return part.row


def judge(
    trials: dict[str, Trial],
    found: Bisection,
    usual: tuple[float, float] | None,
    noise_floor: float,
) -> Verdict:
    """The verdict by the rules above; pure, on what the trials gave."""
    base = trials[AS_IT_WAS]
    if not _sound(base, base, usual, found):
        return _judge_gradient(trials, found, usual)
    if base.rise <= max(RISE, 4 * noise_floor):
        return Verdict(
            "unresolved",
            "nothing is out of the usual range, and the step lowers the loss of its rows "
            "as a step should",
        )
    for name in (ADAMW, FRESH_ADAMW):
        if (trial := trials[name]).loss_after_nats is not None and trial.rise <= max(
            RISE, 4 * noise_floor
        ):
            return Verdict(
                "optimizer",
                "gradient and loss are sound, the step raises the loss by "
                f"{_share(base.rise)}; {name}: {_share(trial.rise)}",
            )
    half = trials[HALF_LR]
    if half.loss_after_nats is not None and half.rise <= base.rise / 2:
        return Verdict(
            "lr",
            "gradient and loss are sound, the step raises the loss by "
            f"{_share(base.rise)}; at half the lr: {_share(half.rise)}",
        )
    return Verdict(
        "unresolved",
        f"the step raises the loss of its rows by {_share(base.rise)}, and no change to it helps",
    )


def _judge_gradient(
    trials: dict[str, Trial], found: Bisection, usual: tuple[float, float] | None
) -> Verdict:
    base = trials[AS_IT_WAS]
    for name, kind in ((FP32, "precision"), (EAGER, "engine"), (PEFT, "engine")):
        if _cured(trials[name], base, usual):
            return Verdict(
                kind, f"{_numbers(base)} as it was, {_numbers(trials[name])} with {name}"
            )
    without = trials[WITHOUT_ROW]
    if _cured(without, base, usual) and found.row is not None:
        return Verdict(
            "data", f"{_numbers(base)} as it was, {_numbers(without)} without {without.note}"
        )
    if found.everything:
        where = f": {found.layer.message}" if found.layer else ""
        return Verdict("unresolved", f"every row is affected, in every trial{where}")
    if found.layer is not None and found.layer.kind in ("weight", "output"):
        why = (
            "no change to this update helps: the state that it started from was off already; "
            f"{found.layer.message}"
        )
        return Verdict("unresolved", why, earlier=True)
    losses = [part.loss_nats for part in found.rows if part.loss_nats is not None]
    if usual is not None and median(losses) > LOSS_RANGE * usual[0]:
        why = (
            f"most rows lie above the usual loss of {usual[0]:.4g}: earlier updates had moved "
            "the adapters there"
        )
        return Verdict("unresolved", why, earlier=True)
    return Verdict(
        "unresolved",
        f"{_numbers(base)} as it was, and no trial brings that back into the usual range",
    )


def _sound(trial: Trial, base: Trial, usual: tuple[float, float] | None, found: Bisection) -> bool:
    """True if the update as it was is in range.

    Without usual numbers: if it is finite and no row stands out.
    """
    if usual is None:
        return base.finite and found.row is None
    return _in_range(trial, usual)


def _in_range(trial: Trial, usual: tuple[float, float]) -> bool:
    if trial.loss_nats is None or trial.grad_norm is None or not trial.finite:
        return False
    return trial.grad_norm <= NORM_RANGE * usual[1] and trial.loss_nats <= LOSS_RANGE * usual[0]


def _cured(trial: Trial, base: Trial, usual: tuple[float, float] | None) -> bool:
    if usual is not None:
        return _in_range(trial, usual)
    if trial.loss_nats is None or trial.grad_norm is None or not trial.finite:
        return False
    if not base.finite or base.loss_nats is None or base.grad_norm is None:
        return True
    return (
        base.grad_norm >= NORM_RANGE * trial.grad_norm
        or base.loss_nats >= LOSS_RANGE * trial.loss_nats
    )


def _numbers(trial: Trial) -> str:
    return f"loss {trial.loss_nats:.4g}, norm {trial.grad_norm:.4g}"


def _share(rise: float) -> str:
    return f"{rise:+.0%}" if math.isfinite(rise) else "beyond all numbers"
