"""The fused engine over a reference engine, and the gradients of both."""

from __future__ import annotations

import random

import torch

from glassloop.data.rows import Row
from glassloop.formula.optim import FlatAdapters

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def rows_of(*lengths: int) -> list[Row]:
    """Rows of random tokens, half of them labels; the third has none.

    The labels are the last half.
    """
    generator = random.Random(0)
    return [
        Row(
            f"r{i}",
            tuple(generator.randrange(5, 500) for _ in range(n)),
            tuple(i != 2 and place > n // 2 for place in range(n)),
        )
        for i, n in enumerate(lengths)
    ]


def fused_of(engine):
    from glassloop.engines.fused.engine import FusedEngine

    return FusedEngine(engine.hf, engine.report)


def adapters_of(engine) -> FlatAdapters:
    """Flat adapters with values that make every gradient differ from 0."""
    adapters = FlatAdapters(engine.hf.named_parameters())
    torch.manual_seed(3)
    adapters.flat.data.copy_(torch.randn_like(adapters.flat) * 0.05)
    return adapters


def gradient(engine, adapters: FlatAdapters, passes) -> tuple[list, torch.Tensor]:
    adapters.zero_grad()
    found = []
    for p in passes:
        loss_sum, row_loss_sums = engine(p)
        (loss_sum / 7).backward()
        found.append((loss_sum.item(), row_loss_sums))
    return found, adapters.grad.clone()
