"""The equivalence class: one update in many ways.

Every member trains the same rows, and leaves its gradient and weights.

A task says what is computed (form of the base, clipping), a shape how: members of one task differ
in shape and engine only, and may differ in nothing else than rounding. What a task must come to is
computed without the loop, by formula.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

import train_loop
from glassloop.config import ENGINES, Config
from glassloop.config.arguments import from_values
from glassloop.health.decision import Outcome
from glassloop.loop.build import build_run
from glassloop.loop.run import Run
from glassloop.predict.tiers import Host, Tiers
from glassloop.verify.problem import (
    LORA_ALPHA,
    LORA_R,
    MAX_TOKENS,
    PEAK_LR,
    TASKS,
    UPDATES,
    WARMUP_UPDATES,
    harden,
)

OPTIMIZERS = ("sgd", "adamw_8bit")


@dataclass(frozen=True)
class Shape:
    """The way of an update: layout, ranks, reduction, engine."""

    ranks: int
    size: int  # rows of a micro-batch
    accumulation: int
    layout: str = "literal"
    pass_tokens: int | None = None  # packed only; None: size x MAX_TOKENS
    reduction: str = "explicit"
    recomputed: bool = False
    probed: bool = False  # every matrix's norms are taken in every update
    base: str = "auto"  # memory.base
    host: Host = "nothing"  # what layers leave in host memory
    chunk: int = 0  # places that products take at a time; 0: all

    @property
    def needs_fused(self) -> bool:
        """True if it says where memory is spent; fused alone can."""
        spent = (self.base, self.host, self.chunk) != ("auto", "nothing", 0)
        return spent or self.layout == "split"


SHAPES = {
    "1x1x8": Shape(1, 1, 8),
    "1x2x4": Shape(1, 2, 4),
    "1x8x1": Shape(1, 8, 1),
    "1x1x8 recomputed": Shape(1, 1, 8, recomputed=True),
    "1x2x4 packed": Shape(1, 2, 4, layout="packed"),
    "1x2x4 packed small": Shape(1, 2, 4, layout="packed", pass_tokens=MAX_TOKENS),
    "1x2x4 packed probed": Shape(1, 2, 4, layout="packed", probed=True),
    "1x2x4 streamed": Shape(1, 2, 4, base="host"),
    "1x2x4 packed streamed on host": Shape(1, 2, 4, layout="packed", base="host", host="all"),
    "1x2x4 packed chunked": Shape(1, 2, 4, layout="packed", chunk=17),
    "1x2x4 chunked streamed on host": Shape(1, 2, 4, base="host", host="inputs", chunk=32),
    "2x1x4": Shape(2, 1, 4),
    "2x2x2": Shape(2, 2, 2),
    "2x2x2 recomputed": Shape(2, 2, 2, recomputed=True),
    "2x2x2 probed": Shape(2, 2, 2, probed=True),
    "2x2x2 packed": Shape(2, 2, 2, layout="packed"),
    "2x2x2 packed small": Shape(2, 2, 2, layout="packed", pass_tokens=MAX_TOKENS),
    "2x2x2 streamed": Shape(2, 2, 2, base="host"),
    "2x2x2 sharded": Shape(2, 2, 2, base="sharded"),
    "2x2x2 split": Shape(2, 2, 2, layout="split"),
    "2x2x2 split chunked streamed": Shape(2, 2, 2, layout="split", base="host", chunk=17),
    "2x2x2 packed chunked on host": Shape(2, 2, 2, layout="packed", host="attention", chunk=17),
    "2x2x2 ddp": Shape(2, 2, 2, reduction="ddp"),
    "2x2x2 ddp recomputed": Shape(2, 2, 2, reduction="ddp", recomputed=True),
    "2x4x1 ddp": Shape(2, 4, 1, reduction="ddp"),
    "2x2x2 ddp packed": Shape(2, 2, 2, reduction="ddp", layout="packed"),
}
# Shapes of the task with clipping.
CLIPPED = ("1x1x8", "1x2x4 packed", "2x2x2", "2x2x2 packed", "2x2x2 ddp")
REFERENCE_ENGINE = "peft"
REFERENCE_SHAPE = "1x1x8"


@dataclass(frozen=True)
class Member:
    """One way to carry a task's updates out."""

    task: str
    engine: str
    shape: str

    @property
    def name(self) -> str:
        return f"{self.task} {self.engine} {self.shape}"

    @property
    def ranks(self) -> int:
        return SHAPES[self.shape].ranks


def engines() -> tuple[str, ...]:
    """Every engine of a config but unsloth.

    That one computes in 16 bits only, and these marks are for fp32.
    """
    return tuple(engine for engine in ENGINES if engine != "unsloth")


def can(engine: str, task: str, shape: str) -> bool:
    """Tell if a config admits the member.

    fused has NF4 weights only, and writes gradients that DDP would not see. It alone streams a
    base and cuts a pass into chunks.
    """
    if engine != "fused":
        return not SHAPES[shape].needs_fused
    return TASKS[task].quantization == "nf4" and SHAPES[shape].reduction == "explicit"


def members() -> list[Member]:
    """The whole class, in the order of the table."""
    return [
        Member(task, engine, shape)
        for task in TASKS
        for engine in engines()
        for shape in (CLIPPED if task == "clipped" else SHAPES)
        if can(engine, task, shape)
    ]


def reference_of(task: str) -> Member:
    """The member whose losses and norms stand for the task between versions."""
    return Member(task, REFERENCE_ENGINE, REFERENCE_SHAPE)


@dataclass(frozen=True)
class Place:
    """Files and folders that workers read and write."""

    folder: Path
    model: Path
    rows: Path
    backend: str  # execution.backend
    collective_timeout_s: int


@dataclass
class Trace:
    """Weights and gradient after an optimizer's updates."""

    change: Tensor | None = None  # (N,) fp32: adapters after the last update minus before the first
    grad: Tensor | None = (
        None  # (N,) fp32: the flat gradient that update 1 applied, at equal weights
    )
    losses: list[float | None] = field(default_factory=list)  # nats a token, by update
    norms: list[float | None] = field(default_factory=list)  # of g before clipping, by update
    stopped_by: str | None = None  # why the updates ended early: what the loop's own guard said


def config_of(member: Member, optimizer: str, place: Place, name: str) -> Config:
    """The member as a config, as a user would ask for it."""
    task, shape = TASKS[member.task], SHAPES[member.shape]
    return from_values(
        {
            "model": {"id": str(place.model), "quantization": task.quantization},
            "lora": {"r": LORA_R, "alpha": LORA_ALPHA},
            "data": {
                "source": str(place.rows),
                "template": "chat",
                "max_tokens": MAX_TOKENS,
                "too_long": "cut",
            },
            "batch": {"size": shape.size, "accumulation": shape.accumulation, "ranks": shape.ranks},
            "schedule": {"updates": UPDATES, "warmup_updates": WARMUP_UPDATES},
            "optimizer": {
                "name": optimizer,
                "lr": PEAK_LR[optimizer],
                "max_grad_norm": task.max_grad_norm,
            },
            "execution": {
                "engine": member.engine,
                "layout": shape.layout,
                "pass_tokens": shape.pass_tokens,
                "reduction": shape.reduction,
                "backend": place.backend,
                "collective_timeout_s": place.collective_timeout_s,
                "precision": "fp32",
                "checkpointing": shape.recomputed,
            },
            "memory": {"base": shape.base},
            "evaluation": {"samples": 0},
            "record": {"probe_every_updates": 1 if shape.probed else None, "capsules": 0},
            "run": {"dir": str(place.folder / "runs"), "name": name},
        }
    )


def spend(run: Run, shape: Shape) -> None:
    """Spend fused's memory as the shape says.

    A card with room for everything would do neither.
    """
    if shape.host != "nothing" or shape.chunk:
        engine: Any = run.replica.engine
        streamed = engine.tiers.streamed
        engine.use_tiers(Tiers(0, shape.host, streamed=streamed, chunk=shape.chunk))


def carry_out(run: Run, update: Callable[[Run, int], Outcome | None]) -> Trace:
    """Do a fresh, hardened run's updates by `update`.

    `update` is train_loop.update_once, or a faulty form of it.
    """
    before = run.replica.adapters.flat.detach().clone()
    trace = Trace()
    for u in range(1, UPDATES + 1):
        try:
            outcome = update(run, u)
        except RuntimeError as error:
            trace.stopped_by = str(error) if f"update {u}" in str(error) else f"update {u}: {error}"
            break
        if u == 1:
            trace.grad = run.replica.adapters.grad.clone()
        if outcome is None or outcome.record.action != "applied":
            why = "given up" if outcome is None else outcome.record.reason
            trace.stopped_by = f"update {u} was not applied: {why}"
            break
        trace.losses.append(outcome.record.loss_nats)
        trace.norms.append(outcome.record.grad_norm_pre_clip)
    else:
        trace.change = run.replica.adapters.flat.detach() - before
    return trace


def train(
    member: Member,
    optimizer: str,
    place: Place,
    update: Callable[[Run, int], Outcome | None] | None = None,
) -> Trace:
    """Build the member's run on hard rows and carry its updates out.

    Raises ValueError where the config or build refuses it.
    """
    words = f"{member.name} {optimizer} {getattr(update, '__name__', '')}".strip()
    run = build_run(config_of(member, optimizer, place, words.replace(" ", "-")))
    try:
        spend(run, SHAPES[member.shape])
        harden(run)
        return carry_out(run, update or train_loop.update_once)
    finally:
        run.close_observers()
