"""Passes through the reference engine and their gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch

from glassloop.data.batches import build_pass
from glassloop.data.rows import Pass, Row
from glassloop.engines.peft import PeftEngine

CPU = torch.device("cpu")
EngineOf = Callable[..., PeftEngine]


def rows_of(*lengths: int, seed: int = 0) -> list[Row]:
    """Random rows; the last two thirds of each are supervised."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Row(
            f"r{i}",
            tuple(torch.randint(6, 512, (length,), generator=generator).tolist()),
            tuple(place >= max(1, length // 3) for place in range(length)),
        )
        for i, length in enumerate(lengths)
    ]


def pass_of(rows: list[Row], packed: bool = False) -> Pass:
    return build_pass(rows, packed=packed, pad_id=0, device=CPU)


def randomise_b(engine: PeftEngine, seed: int = 1) -> None:
    """Give B values.

    A's gradient is then not zero, and the adapters take part in the output.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in engine.hf.named_parameters():
        if "lora_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.05)


def gradient(engine: PeftEngine, p: Pass) -> torch.Tensor:
    """All adapters' gradients of one pass, flat."""
    engine.zero_grad()
    loss_sum, _ = engine(p)
    loss_sum.backward()
    return torch.cat([q.grad.flatten() for q in engine.parameters() if q.requires_grad])  # type: ignore[union-attr]
