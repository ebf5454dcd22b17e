"""The update again with one thing changed at a time.

A single step cannot show what rounding of 8-bit moments did in earlier ones: "32-bit AdamW" starts
from the same moments, so it differs only where the step itself is at fault, and "fresh moments"
tells whether the moments are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from glassloop.base.card_errors import first_line, lacks_memory
from glassloop.config import Config
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
from glassloop.replay.verdict import (
    ADAMW,
    AS_IT_WAS,
    EAGER,
    FP32,
    FRESH_ADAMW,
    HALF_LR,
    PEFT,
    WITHOUT_ROW,
    Trial,
    Verdict,
    judge,
    worst_row,
)

IN_ORDER = (AS_IT_WAS, WITHOUT_ROW, HALF_LR, ADAMW, FRESH_ADAMW, FP32, EAGER, PEFT)


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
    # G of the update as it was, before clipping.
    grad = scene.parts.replica.adapters.grad / scene.parts.replica.scale.value
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
    """Try as it was, without the worst row, at half the lr."""
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
        b_lr_ratio=asked.b_lr_ratio,
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
            scene.parts.replica.plain_engine.attention == "eager",
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
        yield _in_another(name, scene, config.model_copy(update=changed), grad)


def _in_another(name: str, scene: Scene, config: Config, grad: Tensor) -> Trial:
    """Try in a model of its own, to which nothing refers afterwards."""
    try:
        parts = make_parts(
            config,
            scene.parts.accelerator,
            pad_id=scene.parts.replica.pad_id,
            rows=scene.rows,
        )
        return _attempt(name, scene, enter(scene, parts), grad)
    except (ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not lacks_memory(error):
            raise
        return Trial(name, note=f"not tried: {first_line(error)}")
