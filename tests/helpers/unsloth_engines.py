"""Engines of Unsloth on a stand-in that this repository writes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from glassloop.config import LoraConfig, ModelConfig
from glassloop.data.batches import build_pass
from glassloop.data.rows import Row
from glassloop.engines.build import build_engine
from glassloop.engines.peft import PeftEngine
from glassloop.formula.optim import FlatAdapters

CPU = torch.device("cpu")
ROWS = [
    Row(str(i), tuple(range(6 + i, 30 + 5 * i)), (False,) * 10 + (True,) * (14 + 4 * i))
    for i in range(3)
]


def engine(
    folder: Path, name: str, *, longest_row: int = 96, checkpointing: bool = False, **model: Any
) -> PeftEngine:
    return build_engine(
        ModelConfig(id=str(folder), **model),
        LoraConfig(r=4, alpha=8),
        precision="bf16",
        checkpointing=checkpointing,
        seed=7,
        device=CPU,
        first=contextlib.nullcontext,
        engine=name,
        longest_row=longest_row,
    )


def sums(one: PeftEngine, *, packed: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    adapters = FlatAdapters(one.hf.named_parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, by_row = one(build_pass(ROWS, packed=packed, pad_id=0, device=CPU))
    total.backward()
    adapters.check_views()
    return total, by_row, adapters.grad
