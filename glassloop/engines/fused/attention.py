"""Causal attention within each row of a pass, rows end to end.

Forward, and backward from what forward kept. Four ways give the same numbers, up to rounding:

    triton      this package's own kernels, for rows of a few hundred tokens; their bits repeat.
                On Hopper alone, since they were measured on no other card.
    flash       torch's own FlashAttention-2 kernel for sequences of varying length (Dao 2023,
                arXiv:2307.08691); on any GPU, in 16 bits, for any head size. It takes fewer key
                than query heads as they are.
    cudnn       cuDNN's kernel, about twice as fast on Hopper. It takes rows of one length, and
                plans for 0.15 s at each new shape: long rows only.
    reference   torch's scaled_dot_product_attention row by row, computed again for its
                gradient; on a CPU and in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glassloop.engines.fused import attention_triton
from glassloop.engines.fused.attention_work import TILES, Tiles, Work, programs
from glassloop.engines.fused.rotary import rotate

LONG_ROWS = 1024  # tokens, from which cuDNN's plan pays


@dataclass(frozen=True)
class Bounds:
    """Places of a pass's rows, and the kernel that serves them."""

    lengths: tuple[int, ...]  # slot tokens of each row
    ends: Tensor  # (rows + 1,) int32 on the device: 0, then the end of each
    kernel: str  # "triton" | "flash" | "cudnn" | "reference"
    work: Work | None = None  # of "triton"

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @staticmethod
    def of(
        lengths: tuple[int, ...], device: torch.device, dtype: torch.dtype, head_size: int
    ) -> Bounds:
        return Bounds.for_kernel(
            choose_kernel(lengths, device, dtype, head_size), lengths, device, TILES.get(head_size)
        )

    @staticmethod
    def for_kernel(
        kernel: str, lengths: tuple[int, ...], device: torch.device, tiles: Tiles | None = None
    ) -> Bounds:
        """Bounds for one kernel, in one copy that nothing waits for.

        `tiles`: block sizes of "triton".
        """
        tables = programs(lengths, tiles) if kernel == "triton" and tiles is not None else []
        tables.append([0, *accumulate(lengths)])
        numbers = torch.tensor([number for one in tables for number in one], dtype=torch.int32)
        if device.type == "cuda":
            numbers = numbers.pin_memory()
        *blocks, ends = numbers.to(device, non_blocking=True).split([len(one) for one in tables])
        work = (
            Work(tiles, *(one.view(-1, 4) for one in blocks))
            if tiles is not None and blocks
            else None
        )
        return Bounds(lengths, ends, kernel, work)


def choose_kernel(
    lengths: tuple[int, ...], device: torch.device, dtype: torch.dtype, head_size: int
) -> str:
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "reference"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "flash"
    if (
        len(set(lengths)) == 1
        and lengths[0] >= LONG_ROWS
        and not torch.are_deterministic_algorithms_enabled()
    ):
        return "cudnn"
    return "triton" if head_size in TILES else "flash"


@dataclass(frozen=True)
class Kept:
    """Tensors that backward needs beside q, k, v."""

    out: Tensor  # (T, heads, D)
    rest: tuple[Any, ...]  # the kernel's own: log-sum-exp and random state


def attention(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds) -> Kept:
    """Attention of a pass; scores are scaled by D ** -0.5.

    q: (T, heads, D); k, v: (T, key heads, D), any row stride.
    """
    scale, longest = q.shape[-1] ** -0.5, bounds.longest
    if bounds.work is not None:
        out, lse = attention_triton.forward(q, k, v, bounds.work)
        return Kept(out, (lse,))
    if bounds.kernel == "flash":
        out, *rest = torch.ops.aten._flash_attention_forward(
            q, k, v, bounds.ends, bounds.ends, longest, longest, 0.0, True, False, scale=scale
        )
        return Kept(out, tuple(rest[:3]))
    if bounds.kernel == "cudnn":
        heads = [by_heads(t, len(bounds.lengths)) for t in (q, k, v)]
        out, *rest = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *heads, None, True, 0.0, True, False, scale=scale
        )
        return Kept(by_tokens(out), tuple(rest[:7]))
    return Kept(attention_reference(q, k, v, bounds), ())


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Kept,
    bounds: Bounds,
    cos: Tensor,
    sin: Tensor,
    *,
    room: int = 0,
) -> Tensor:
    """Gradients of q, k before `rotate`, and v, side by side.

    (T, (heads + 2 key heads) * D + room). The matrix is made here, since torch's kernels take most
    memory while it need not be there.

    Args:
        grad: (T, heads, D), of the output.
        cos, sin: (T, D / 2) fp32, by which q and k were turned.
        room: columns at the right that are left as they are.
    """
    queries, keys = q.shape[1] * q.shape[2], k.shape[1] * k.shape[2]
    if bounds.work is not None:
        into = q.new_empty(len(q), queries + 2 * keys + room)
        attention_triton.backward(
            grad,
            q,
            k,
            v,
            kept.out,
            kept.rest[0],
            cos,
            sin,
            bounds.work,
            into[:, : queries + 2 * keys],
        )
        return into
    dq, dk, dv = _gradients(grad, q, k, v, kept, bounds)
    into = q.new_empty(len(q), queries + 2 * keys + room)
    rotate(dq.flatten(1), cos, sin, into[:, :queries], back=True)
    rotate(dk.flatten(1), cos, sin, into[:, queries : queries + keys], back=True)
    into[:, queries + keys : queries + 2 * keys].copy_(dv.flatten(1))
    return into


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Kept, bounds: Bounds
) -> tuple[Tensor, Tensor, Tensor]:
    """In q, k, v as they are, each in its shape."""
    scale, longest = q.shape[-1] ** -0.5, bounds.longest
    if bounds.kernel == "flash":
        lse, state, unused = kept.rest
        return torch.ops.aten._flash_attention_backward(
            grad,
            q,
            k,
            v,
            kept.out,
            lse,
            bounds.ends,
            bounds.ends,
            longest,
            longest,
            0.0,
            True,
            state,
            unused,
            scale=scale,
        )
    if bounds.kernel == "cudnn":
        lse, ends_q, ends_k, longest_q, longest_k, seed, offset = kept.rest
        heads = [by_heads(t, len(bounds.lengths)) for t in (grad, q, k, v, kept.out)]
        found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *heads,
            lse,
            seed,
            offset,
            None,
            ends_q,
            ends_k,
            longest_q,
            longest_k,
            0.0,
            True,
            scale=scale,
        )
        dq, dk, dv = (by_tokens(t) for t in found)
        return dq, dk, dv
    return attention_backward_reference(grad, q, k, v, bounds)


def by_heads(t: Tensor, rows: int) -> Tensor:
    """(T, heads, D) to (rows, heads, T / rows, D), a view."""
    return t.unflatten(0, (rows, -1)).transpose(1, 2)


def by_tokens(t: Tensor) -> Tensor:
    """(rows, heads, length, D) to (T, heads, D).

    A view if memory lies so.
    """
    return t.transpose(1, 2).flatten(0, 1)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds) -> Tensor:
    """(T, heads, D): each row by itself."""
    outs = []
    for start, end in pairwise([0, *accumulate(bounds.lengths)]):
        one, two, three = (
            t[start:end].transpose(0, 1).unsqueeze(0) for t in (q, k, v)
        )  # (1, heads, length, D)
        outs.append(
            F.scaled_dot_product_attention(one, two, three, is_causal=True, enable_gqa=True)[
                0
            ].transpose(0, 1)
        )
    return torch.cat(outs)


def attention_backward_reference(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bounds: Bounds
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_(True) for t in (q, k, v)]
        out = attention_reference(leaves[0], leaves[1], leaves[2], bounds)
    dq, dk, dv = torch.autograd.grad(out, leaves, grad)
    return dq, dk, dv
