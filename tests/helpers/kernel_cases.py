"""Kernels held to their plain torch references: inputs, marks and errors."""

from __future__ import annotations

import importlib
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="runs in the process that test_fused_kernels.py starts"
)


def as_stored(value: torch.Tensor, dtype: torch.dtype, *, by_kernel: bool) -> torch.Tensor:
    """fp32 in another dtype, as it is stored.

    Rounded to the nearest, but the interpreter cuts the lower bits of a bf16 off.
    """
    if by_kernel and dtype == torch.bfloat16:
        value = (value.view(torch.int32) & -65536).view(torch.float32)
    return value.to(dtype)


def strided(rows: int, columns: int, dtype: torch.dtype, room: int = 16) -> torch.Tensor:
    return torch.zeros(rows, columns + room, dtype=dtype)


def kernels(name: str):
    """(reference, kernel) of a module's function.

    The kernel only where it can run.
    """
    module, function = name.split(".")
    found = importlib.import_module(f"glassloop.engines.fused.{module}")
    names = [f"{function}_reference", *([f"{function}_triton"] if INTERPRETED else [])]
    return [getattr(found, one) for one in names]


# Relative L2 against fp64: a few units of rounding.
MARKS = {torch.float32: 3e-6, torch.bfloat16: 1e-2}


def off(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


def wide_heads(tokens: int, heads: int, key_heads: int, size: int, dtype: torch.dtype):
    """q, k, v side by side, with room; angles; a gradient.

    As a layer has them. The gradient has wider rows too.
    """
    from glassloop.engines.fused.rotary import angles

    torch.manual_seed(0)
    widths = [heads * size, key_heads * size, key_heads * size]
    wide = torch.randn(tokens, sum(widths) + 16).to(dtype)
    q, k, v = (t.unflatten(1, (-1, size)) for t in wide[:, :-16].split(widths, dim=1))
    grad = torch.randn(tokens, widths[0] + 16).to(dtype)[:, :-16].unflatten(1, (-1, size))
    return grad, q, k, v, angles(torch.arange(tokens), torch.rand(size // 2), 1.0)


# (own, step, split) of forward, queries and keys: blocks as long as a step, longer, shorter, with
# one loop.
CUTS = [
    ((16, 16, True), (16, 16, True), (16, 16, True)),
    ((32, 16, True), (32, 16, False), (32, 16, True)),
    ((16, 32, True), (16, 32, True), (16, 32, True)),
    ((32, 16, False), (32, 16, True), (16, 32, False)),
]
