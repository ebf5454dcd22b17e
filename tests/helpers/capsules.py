"""Small capsules: parts, facts and the file they are saved in."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glassloop.data.rows import Row
from glassloop.formula.optim import FlatAdapters, make_optimizer
from glassloop.saved.capsule import (
    CapsuleFacts,
    CapsuleSaved,
    Expected,
    find_capsules,
    save_capsule,
)
from glassloop.saved.state import rng_state

CPU = torch.device("cpu")
NAMES = [
    f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{s}.default.weight"
    for i in (0, 1)
    for s in "AB"
]
ROWS = {
    17: Row("train:17", (1, 40, 41, 42), (False, False, True, True)),
    3: Row("train:3", (1, 50, 51), (False, True, False)),
    4: Row("train:4", (1, 60), (False, False)),
}


def parts(
    seed: int = 0, optimizer: str = "adamw_8bit"
) -> tuple[FlatAdapters, torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(seed)
    adapters = FlatAdapters(
        (name, nn.Parameter(torch.randn(8, 300, generator=generator))) for name in NAMES
    )
    moved = make_optimizer(
        optimizer, adapters.flat, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0
    )
    adapters.grad.copy_(torch.randn(adapters.grad.shape, generator=generator))
    moved.step()
    return adapters, moved


def facts(update: int = 37, why: str = "norm_spike", **changed: Any) -> CapsuleFacts:
    expected = Expected(2.5, math.inf, (5.0, math.nan), (1.0, 2.0), ((3.0, 2.0), (math.nan,)))
    values = dict(
        update=update,
        epoch=0,
        attempt=1,
        why=why,
        world_size=2,
        lr=1e-4,
        supervised_tokens=3,
        loss_scale=1.0,
        finite_updates=0,
        max_grad_norm=None,
        packed=False,
        pad_id=0,
        base_hash="ab" * 32,
        config={"seed": 1, "model": {"id": "x"}},
        versions={"torch": "2"},
        passes=(((17,), (3,)), ((4,),)),
        rows=ROWS,
        expected=expected,
    )
    return CapsuleFacts(**{**values, **changed})  # type: ignore[arg-type]


def save(
    folder: Path,
    of: CapsuleFacts | None = None,
    *,
    text: str = "ids",
    keep: int = 4,
    most_gib: float = 1.0,
    seed: int = 0,
) -> CapsuleSaved:
    adapters, optimizer = parts(seed)
    return save_capsule(
        folder,
        of or facts(),
        text=text,
        adapters=adapters,
        optimizer=optimizer,
        rng_states=[rng_state(CPU)] * 2,
        keep=keep,
        most_gib=most_gib,
    )


def names(folder: Path) -> list[str]:
    return [path.name for path in find_capsules(folder)]
