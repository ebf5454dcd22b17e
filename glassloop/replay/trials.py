"""The update again with one thing changed, and a verdict.

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

A single step cannot show what rounding of 8-bit moments did in earlier ones: "32-bit AdamW" starts
from the same moments, so it differs only where the step itself is at fault, and "fresh moments"
tells whether the moments are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from statistics import median
from typing import Any

import torch
from torch import Tensor

from glassloop.config.config import Config
from glassloop.data.batches import Window
from glassloop.formula.optim import l2_norm, make_optimizer
from glassloop.replay.bisect import Bisection
from glassloop.replay.progress import Tell, silent
from glassloop.replay.replica import Parts, make_parts
from glassloop.replay.reproduce import (
    Scene,
    carry_out,
    clip_of,
    enter,
    loss_now,
    relative_distance,
    replayed,
    step,
)

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
IN_ORDER = (AS_IT_WAS, WITHOUT_ROW, HALF_LR, ADAMW, FRESH_ADAMW, FP32, EAGER, PEFT)


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


@dataclass(frozen=True)
class Trials:
    trials: tuple[Trial, ...]
    verdict: Verdict


def try_out(
    scene: Scene,
    config: Config,
    found: Bisection,
    usual: tuple[float, float] | None,
    noise_floor: float,
    tell: Tell = silent,
) -> Trials:
    """Re-run the update in every way, then judge.

    Args:
        usual: loss and norm of sound updates. noise_floor: relative, of loss and norm.
        tell: is called before each trial.
    """
    replayed(scene)
    grad = (
        scene.parts.replica.adapters.grad / scene.parts.replica.scale.value
    )  # g of the update as it was, before clipping
    coming = chain(
        _same_engine(scene, found, grad),
        _adamw(scene, config, grad),
        _other_engines(scene, config, grad),
    )
    trials = []
    for done, name in enumerate(IN_ORDER):
        tell(done, len(IN_ORDER), name)
        trials.append(next(coming))
    enter(scene)
    return Trials(
        tuple(trials), judge({trial.name: trial for trial in trials}, found, usual, noise_floor)
    )


def _same_engine(scene: Scene, found: Bisection, grad: Tensor) -> Iterator[Trial]:
    """Try the update as it was, without its worst row, at half the rate."""
    yield _attempt(AS_IT_WAS, scene, enter(scene), grad)
    yield _without_row(scene, found, grad)
    slower = replace(scene, lr=scene.lr / 2)
    yield _attempt(HALF_LR, slower, enter(slower), grad)


def _attempt(
    name: str,
    scene: Scene,
    parts: Parts,
    grad: Tensor,
    window: Window | None = None,
    note: str = "",
) -> Trial:
    """Compute gradient, step and the loss after it.

    The parts must have been put right by `enter`. A step that is not finite is not applied.
    """
    window = window or scene.window
    n = sum(
        scene.rows[row].supervised_tokens for one in window.passes for rows in one for row in rows
    )
    carried = carry_out(parts, scene.rows, window, n, scene.state.rng_states)
    off = (
        None
        if window is not scene.window
        else relative_distance(parts.replica.adapters.grad / parts.replica.scale.value, grad)
    )
    if not carried.finite:
        return Trial(name, carried.loss_nats, carried.grad_norm, grad_off=off, note=note)
    clip = clip_of(scene, carried.grad_norm)
    before = parts.replica.adapters.flat.detach().clone()
    step(parts, clip)
    change = l2_norm(parts.replica.adapters.flat.detach() - before).item()
    after = loss_now(parts, scene.rows, window, n, scene.state.rng_states)
    return Trial(name, carried.loss_nats, carried.grad_norm, clip, change, after, off, note)


def _without_row(scene: Scene, found: Bisection, grad: Tensor) -> Trial:
    row = worst_row(found)
    if len(scene.window.rows) < 2 or scene.supervised_tokens == scene.rows[row].supervised_tokens:
        return Trial(WITHOUT_ROW, note="not tried: no other row has supervised tokens")
    passes = tuple(
        tuple(left for one in rank if (left := tuple(other for other in one if other != row)))
        for rank in scene.window.passes
    )
    window = replace(
        scene.window,
        rows=tuple(other for other in scene.window.rows if other != row),
        passes=passes,
    )
    return _attempt(WITHOUT_ROW, scene, enter(scene), grad, window, scene.row_names[row])


def worst_row(found: Bisection) -> int:
    """Index of the row that stands out, or of the largest gradient."""
    part = found.row or max(
        found.rows, key=lambda part: math.inf if not part.finite else part.grad_norm
    )
    assert part.row is not None
    return part.row


def _adamw(scene: Scene, config: Config, grad: Tensor) -> Iterator[Trial]:
    """A 32-bit AdamW from the run's moments, and from none."""
    asked = config.optimizer
    if asked.name in ("adamw", "sgd"):
        yield Trial(ADAMW, note=f"not tried: the run used {asked.name}")
    else:
        yield _with_adamw(ADAMW, scene, config, as_32_bit(scene.state.moments), grad)
    if asked.name == "sgd":
        yield Trial(FRESH_ADAMW, note="not tried: the run used sgd")
    elif not scene.state.moments[0]:
        yield Trial(FRESH_ADAMW, note="not tried: the moments were fresh")
    else:
        fresh = {
            "optimizer": "AdamW",
            "elements": scene.parts.replica.adapters.flat.numel(),
            "values": {},
        }
        yield _with_adamw(FRESH_ADAMW, scene, config, ({}, fresh), grad)


def _with_adamw(
    name: str, scene: Scene, config: Config, moments: tuple[dict[str, Tensor], Any], grad: Tensor
) -> Trial:
    asked = config.optimizer
    optimizer = make_optimizer(
        "adamw",
        scene.parts.replica.adapters.flat,
        lr=scene.lr,
        beta1=asked.beta1,
        beta2=asked.beta2,
        eps=asked.eps,
        weight_decay=asked.weight_decay,
    )
    replica = replace(scene.parts.replica, optimizer=optimizer)
    other = replace(scene.parts, replica=replica)
    return _attempt(name, scene, enter(scene, other, moments), grad)


def as_32_bit(moments: tuple[dict[str, Tensor], Any]) -> tuple[dict[str, Tensor], Any]:
    """bitsandbytes' state as that of torch's AdamW.

    An 8-bit entry is qmap[code] times its block's absmax.
    """
    tensors, plain = moments
    built = {"optimizer": "AdamW", "elements": plain["elements"], "values": {}}
    if not tensors:
        return {}, built
    full = {}
    for moment, name in ((1, "exp_avg"), (2, "exp_avg_sq")):
        codes = tensors[f"state{moment}"]
        if f"qmap{moment}" in tensors:
            absmax = tensors[f"absmax{moment}"]
            block = -(-codes.numel() // absmax.numel())
            scales = absmax.repeat_interleave(block)[: codes.numel()]
            codes = tensors[f"qmap{moment}"][codes.long()] * scales
        full[name] = codes.float()
    return {**full, "step": torch.tensor(float(plain["values"]["step"]))}, built


def _other_engines(scene: Scene, config: Config, grad: Tensor) -> Iterator[Trial]:
    """Try fp32, eager attention and the reference engine.

    Each needs a model of its own, which is dropped before the next is built.
    """
    execution, model = config.execution, config.model
    sdpa = (
        model.model_copy(update={"attention": "sdpa"})
        if model.attention == "flash_attention_2"
        else model
    )
    variants = {
        FP32: (
            execution.precision == "fp32",
            {"execution": execution.model_copy(update={"precision": "fp32"}), "model": sdpa},
        ),
        EAGER: (
            model.attention == "eager",
            {"model": model.model_copy(update={"attention": "eager"})},
        ),
        PEFT: (
            execution.engine == "peft",
            {"execution": execution.model_copy(update={"engine": "peft"})},
        ),
    }
    for name, (used, changed) in variants.items():
        if used:
            yield Trial(name, note="not tried: the run used it")
            continue
        try:
            parts = make_parts(
                config.model_copy(update=changed),
                scene.parts.accelerator,
                pad_id=scene.parts.replica.pad_id,
                rows=scene.rows,
            )
            yield _attempt(name, scene, enter(scene, parts), grad)
        except (ValueError, torch.OutOfMemoryError) as error:
            yield Trial(name, note=f"not tried: {str(error).splitlines()[0]}")


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
