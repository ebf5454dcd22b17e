"""Causal attention within each row of a pass, for short rows.

Rows lie end to end and are too short to fill a GPU one by one. H query heads share a key head.
Three kernels, none of which adds to memory that another program writes to, so that bits repeat:

    forward    a program is a block of queries and a head. It walks over the row's keys up to its
               own.
    queries    likewise; the gradient of q, and what `keys` needs of the output:
               delta = rowsum(grad * out).
    keys       a program is a block of keys and a key head. It walks over the queries from its own
               to the row's end, of all the heads that share it, and so adds their gradients of k
               and v up in registers.

q and k come turned by their positions. Gradients leave turned back, side by side in one matrix as
the product of q, k and v has them. Scores count in powers of 2, log2(e) being part of their scale,
and so does the log-sum-exp. The algorithm is FlashAttention's (Dao 2023, arXiv:2307.08691).
"""

# pyright: reportCallIssue=false
# (a launch has options, num_warps say, that are no parameters of the kernel)
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glassloop.engines.fused.attention_kernels import (
    WIDTH,
    forward_kernel,
    keys_kernel,
    queries_kernel,
)
from glassloop.engines.fused.attention_work import Scores, Tile, Work
from glassloop.engines.fused.launch import launch
from glassloop.engines.fused.rotary import Angles

WIDEST = 1 << 31  # elements of a tensor whose offsets 32 bits hold


def _options(
    scores: Scores, tile: Tile, heads: int, key_heads: int, size: int, parts: Sequence[Tensor]
) -> dict[str, Any]:
    """Arguments that all three kernels share.

    `parts`: what they read and write by rows.
    """
    cap = scores.cap or 1.0
    return {
        "bend": scores.scale_of(size) / cap,
        "cap": cap * math.log2(math.e),
        "window": scores.window or 0,
        "GROUP": heads // key_heads,
        "D": size,
        "OWN": tile.own,
        "STEP": tile.step,
        "SPLIT": tile.split,
        "CAPPED": scores.cap is not None,
        "WINDOWED": scores.window is not None,
        "WIDE": any(len(t) * t.stride(0) >= WIDEST for t in parts),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def forward(q: Tensor, k: Tensor, v: Tensor, work: Work) -> tuple[Tensor, Tensor]:
    """Returns (T, heads, D) and the log-sum-exp for `backward`.

    The latter is to base 2, of the scaled scores, (heads, T) fp32.

    Args:
        q: (T, heads, D), D a power of 2 from 16 up. k, v: (T, key heads, D). Any row stride.
    """
    tokens, heads, size = _checked(q, k, v)
    out, lse, tile = (
        q.new_empty(q.shape),
        q.new_empty(heads, tokens, dtype=torch.float32),
        work.tiles.forward,
    )
    launch(
        forward_kernel, (heads, len(work.forward)),
        q, k, v, out, lse, work.forward, tokens, q.stride(0), k.stride(0), v.stride(0),
        work.scores.scale_of(size) * math.log2(math.e),
        **_options(work.scores, tile, heads, k.shape[1], size, (q, k, v, out.flatten(1))),
    )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    by: Angles,
    work: Work,
    into: Tensor,
) -> None:
    """Write the gradients of q, k (before they were turned) and v.

    They go to `into` (T, (heads + 2 key heads) * D), any row stride.

    Args:
        grad: (T, heads, D), of the output. out, lse: as `forward` gave them.
        by: angles of whole heads by halves, by which q and k were turned.
    """
    assert by.halves
    sums = lse.new_empty(*lse.shape, WIDTH.value)
    gradient_of_queries(grad, q, k, v, out, lse, sums, by, work, into)
    gradient_of_keys(grad, q, k, v, sums, by, work, into)


def gradient_of_queries(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sums: Tensor,
    by: Angles, work: Work, into: Tensor,
) -> None:  # fmt: skip
    """Write the first heads * D columns of `into`, and `sums`.

    `sums` (heads, T, WIDTH) fp32: the log-sum-exp at 0, delta at WIDTH / 2.
    """
    tokens, heads, size = _checked(q, k, v, grad, out)
    assert by.cos.is_contiguous() and by.sin.is_contiguous() and into.stride(1) == 1
    tile, scale = work.tiles.queries, work.scores.scale_of(size)
    launch(
        queries_kernel, (heads, len(work.queries)),
        grad, q, k, v, out, lse, sums, by.cos, by.sin, into, work.queries, tokens,
        grad.stride(0), q.stride(0), k.stride(0), v.stride(0), out.stride(0), into.stride(0),
        scale, scale * math.log2(math.e),
        **_options(work.scores, tile, heads, k.shape[1], size, (grad, q, k, v, out, into)),
    )  # fmt: skip


def gradient_of_keys(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sums: Tensor,
    by: Angles,
    work: Work,
    into: Tensor,
) -> None:
    """The other columns of `into`: of k, then of v."""
    tokens, heads, size = _checked(q, k, v, grad)
    tile, scale = work.tiles.keys, work.scores.scale_of(size)
    launch(
        keys_kernel, (k.shape[1], len(work.keys)),
        grad, q, k, v, sums, by.cos, by.sin, into, work.keys, tokens,
        grad.stride(0), q.stride(0), k.stride(0), v.stride(0), into.stride(0),
        scale, scale * math.log2(math.e),
        **_options(work.scores, tile, heads, k.shape[1], size, (grad, q, k, v, into)),
    )  # fmt: skip


def _checked(*parts: Tensor) -> tuple[int, int, int]:
    """Tokens, heads and size of the first tensor.

    All have their heads side by side.
    """
    assert all(t.stride(2) == 1 and t.stride(1) == t.shape[2] for t in parts)
    tokens, heads, size = parts[0].shape
    assert size >= 16 and size & (size - 1) == 0 and heads % parts[1].shape[1] == 0
    return tokens, heads, size
