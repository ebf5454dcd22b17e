"""Faulty ways to do the same updates; `glassloop verify` must notice each.

Training loops have really had each of these faults.

A mutant is a function (run, u) that does update u by the loop's own update_once, with one
part of the run exchanged for its duration.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import train_loop
from glassloop.data.rows import IGNORE, Pass
from glassloop.health.decision import Outcome
from glassloop.loop.replica import Replica
from glassloop.loop.run import Run
from glassloop.verify.members import REFERENCE_ENGINE, Member


@dataclass(frozen=True)
class Mutant:
    """A fault, and the member that is the same without it."""

    fault: str  # in words
    update: Callable[[Run, int], Outcome | None]
    task: str = "plain"
    shape: str = "2x2x2"
    optimizer: str = "sgd"

    @property
    def name(self) -> str:
        return self.update.__name__

    @property
    def sound(self) -> Member:
        return Member(self.task, REFERENCE_ENGINE, self.shape)


@contextlib.contextmanager
def exchanged(owner: Run | Replica, part: str, value: Any) -> Iterator[None]:
    """Exchange one field of the run or its replica inside the block."""
    kept = getattr(owner, part)
    setattr(owner, part, value)
    try:
        yield
    finally:
        setattr(owner, part, kept)


class Around:
    """An engine with another forward; all else is its own."""

    def __init__(self, engine: Any, call: Callable[[Pass], tuple[Tensor, Tensor]]):
        self._engine, self._call = engine, call

    def __call__(self, p: Pass) -> tuple[Tensor, Tensor]:
        return self._call(p)

    def no_sync(self) -> contextlib.AbstractContextManager[Any]:
        own = getattr(self._engine, "no_sync", None)
        return own() if own else contextlib.nullcontext()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def with_loss_times(run: Run, u: int, factor: Callable[[Pass], float]) -> Outcome | None:
    """Update u with each pass's loss multiplied by `factor` of the pass."""

    def call(p: Pass) -> tuple[Tensor, Tensor]:
        loss_sum, row_loss_sums = engine(p)
        return loss_sum * factor(p), row_loss_sums

    engine = run.replica.engine
    with exchanged(run.replica, "engine", Around(engine, call)):
        return train_loop.update_once(run, u)


def scheduler_once_per_rank(run: Run, u: int) -> Outcome | None:
    lr = run.plan.lr  # by update; a schedule that has run out gives 0
    advanced = tuple(
        lr[i * run.replica.ranks] if i * run.replica.ranks < len(lr) else 0.0
        for i in range(len(lr))
    )
    with exchanged(run, "plan", replace(run.plan, lr=advanced)):
        return train_loop.update_once(run, u)


def loss_divided_twice(run: Run, u: int) -> Outcome | None:
    return with_loss_times(run, u, lambda _: 1.0 / run.plan.accumulation)


def mean_of_means(run: Run, u: int) -> Outcome | None:
    window = run.batches.window(u)
    n, passes = run.batches.supervised_tokens(window), sum(len(share) for share in window.passes)
    return with_loss_times(run, u, lambda p: n / (passes * max(p.supervised_tokens, 1)))


def unwrapped_forward(run: Run, u: int) -> Outcome | None:
    inner = run.replica.plain_engine
    with exchanged(run.replica, "engine", Around(inner, inner)):
        return train_loop.update_once(run, u)


def tail_as_if_full(run: Run, u: int) -> Outcome | None:
    share = len(run.batches.window(u).rows) / run.plan.rows_per_update
    return with_loss_times(run, u, lambda _: share)


def labels_shifted_twice(run: Run, u: int) -> Outcome | None:
    def call(p: Pass) -> tuple[Tensor, Tensor]:
        targets = torch.cat(
            [p.targets[:, 1:], torch.full_like(p.targets[:, :1], IGNORE)], dim=1
        )  # (B, T)
        return engine(
            replace(p, targets=targets, places=(targets.flatten() != IGNORE).nonzero().squeeze(1))
        )

    engine = run.replica.engine
    with exchanged(run.replica, "engine", Around(engine, call)):
        return train_loop.update_once(run, u)


def clipping_per_micro_batch(run: Run, u: int) -> Outcome | None:
    def call(p: Pass) -> tuple[Tensor, Tensor]:
        most = run.config.optimizer.max_grad_norm
        # Of what earlier micro-batches have left.
        norm = torch.linalg.vector_norm(run.replica.adapters.grad)
        if most is not None and norm > most:
            run.replica.adapters.grad.mul_(most / norm)
        return engine(p)

    engine = run.replica.engine
    with exchanged(run.replica, "engine", Around(engine, call)):
        return train_loop.update_once(run, u)


def rank_local_skip(run: Run, u: int) -> Outcome | None:
    if run.replica.rank != 1 or u != 2:
        return train_loop.update_once(run, u)
    optimizer: Any = run.replica.optimizer
    optimizer.step = lambda: None  # this rank alone takes the update for a bad one
    try:
        return train_loop.update_once(run, u)
    finally:
        del optimizer.step


MUTANTS = (
    Mutant("the schedule advances once for each rank", scheduler_once_per_rank),
    Mutant("the loss is divided by the accumulation again", loss_divided_twice),
    Mutant("micro-batches are averaged instead of tokens", mean_of_means),
    Mutant("the forward pass goes around DDP's wrapper", unwrapped_forward, shape="2x2x2 ddp"),
    Mutant("a short tail window is divided as if it were full", tail_as_if_full),
    Mutant("labels are shifted twice", labels_shifted_twice),
    Mutant("each micro-batch is clipped", clipping_per_micro_batch, task="clipped"),
    Mutant("one rank skips an update that the other applies", rank_local_skip),
)
