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
                gradient; on a CPU and in fp32. Capped scores are computed in plain torch, in fp32.

A window or a cap changes the scores (attention_work.Scores). A window that no row exceeds is none.
Torch's FlashAttention takes windows, and no cap; cuDNN gets neither.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glassloop.engines.fused import attention_triton
from glassloop.engines.fused.attention_work import (
    PLAIN,
    TILES,
    Scores,
    Tiles,
    Work,
    programs,
)
from glassloop.engines.fused.launch import capability
from glassloop.engines.fused.rotary import Angles, no_angles, rotate

LONG_ROWS = 1024  # tokens, from which cuDNN's plan pays
MOST_CUDNN, MOST_FLASH = 128, 256  # head sizes
QUERIES = 1024  # of a row, whose capped scores lie in memory at a time


@dataclass(frozen=True)
class Bounds:
    """Places of a pass's rows, and the kernel that serves them."""

    lengths: tuple[int, ...]  # slot tokens of each row
    ends: Tensor  # (rows + 1,) int32 on the device: 0, then the end of each
    kernel: str  # "triton" | "flash" | "cudnn" | "reference"
    work: Work | None = None  # of "triton"
    scores: Scores = PLAIN

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @staticmethod
    def of(
        lengths: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
        head_size: int,
        scores: Scores = PLAIN,
    ) -> Bounds:
        """Bounds for the quickest kernel that computes these scores."""
        if scores.window is not None and scores.window >= max(lengths):
            scores = replace(scores, window=None)
        kernel = choose_kernel(lengths, device, dtype, head_size, scores)
        return Bounds.for_kernel(kernel, lengths, device, TILES.get(head_size), scores)

    @staticmethod
    def for_kernel(
        kernel: str,
        lengths: tuple[int, ...],
        device: torch.device,
        tiles: Tiles | None = None,
        scores: Scores = PLAIN,
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
        work = None
        if tiles is not None and blocks:
            forward, queries, keys = (one.view(-1, 4) for one in blocks)
            work = Work(tiles, forward, queries, keys, scores)
        return Bounds(lengths, ends, kernel, work, scores)


def choose_kernel(
    lengths: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    head_size: int,
    scores: Scores = PLAIN,
) -> str:
    if device.type not in ("cuda", "meta") or dtype not in (torch.bfloat16, torch.float16):
        return "reference"
    hopper = capability(device) // 10 == 9
    if scores.cap is not None:
        return "triton" if hopper and head_size in TILES else "reference"
    if head_size % 8 or head_size > MOST_FLASH:
        return "reference"
    if not hopper:
        return "flash"
    if (
        len(set(lengths)) == 1
        and lengths[0] >= LONG_ROWS
        and scores.window is None
        and head_size <= MOST_CUDNN
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
    """Attention of q (T, heads, D), k, v (T, key heads, D).

    By the scores of `bounds`. Any row stride."""
    scale, longest = bounds.scores.scale_of(q.shape[-1]), bounds.longest
    if bounds.work is not None:
        out, lse = attention_triton.forward(q, k, v, bounds.work)
        return Kept(out, (lse,))
    if bounds.kernel == "flash":
        out, *rest = torch.ops.aten._flash_attention_forward(
            q, k, v, bounds.ends, bounds.ends, longest, longest, 0.0, True, False,
            scale=scale, **_window(bounds.scores),
        )  # fmt: skip
        return Kept(out, tuple(rest[:3]))
    if bounds.kernel == "cudnn":
        heads = [by_heads(t, len(bounds.lengths)) for t in (q, k, v)]
        out, *rest = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *heads, None, True, 0.0, True, False, scale=scale
        )
        return Kept(by_tokens(out), tuple(rest[:7]))
    return Kept(attention_reference(q, k, v, bounds), ())


def _window(scores: Scores) -> dict[str, int]:
    """FlashAttention's arguments; its window leaves the token itself out."""
    if scores.window is None:
        return {}
    return {"window_size_left": scores.window - 1, "window_size_right": 0}


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Kept,
    bounds: Bounds,
    by: Angles,
    *,
    room: int = 0,
) -> Tensor:
    """Gradients of q, k before `rotate`, and v, side by side.

    (T, (heads + 2 key heads) * D + room). The matrix is made here, since torch's kernels take most
    memory while it need not be there.

    Args:
        grad: (T, heads, D), of the output.
        by: angles by which q and k were turned.
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
            by if by.halves else no_angles(len(q), by.size, q.device),
            bounds.work,
            into[:, : queries + 2 * keys],
        )
        if not by.halves:
            both = into[:, : queries + keys]
            rotate(both, by, both, back=True)
        return into
    dq, dk, dv = gradients(grad, q, k, v, kept, bounds)
    into = q.new_empty(len(q), queries + 2 * keys + room)
    rotate(dq.flatten(1), by, into[:, :queries], back=True)
    rotate(dk.flatten(1), by, into[:, queries : queries + keys], back=True)
    into[:, queries + keys : queries + 2 * keys].copy_(dv.flatten(1))
    return into


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Kept, bounds: Bounds
) -> tuple[Tensor, Tensor, Tensor]:
    """In q, k, v as they are, each in its shape."""
    if bounds.work is not None:
        into = q.new_empty(len(q), (q.shape[1] + 2 * k.shape[1]) * q.shape[2])
        none = no_angles(len(q), q.shape[2], q.device)
        attention_triton.backward(grad, q, k, v, kept.out, kept.rest[0], none, bounds.work, into)
        parts = into.unflatten(1, (-1, q.shape[2])).split([q.shape[1], k.shape[1], k.shape[1]], 1)
        return parts[0], parts[1], parts[2]
    scale, longest = bounds.scores.scale_of(q.shape[-1]), bounds.longest
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
            **_window(bounds.scores),
        )
    if bounds.kernel == "cudnn":
        lse, ends_q, ends_k, longest_q, longest_k, seed, offset = kept.rest
        heads = [by_heads(t, len(bounds.lengths)) for t in (grad, q, k, v, kept.out)]
        found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *heads, lse, seed, offset, None, ends_q, ends_k, longest_q, longest_k, 0.0, True,
            scale=scale,
        )  # fmt: skip
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


def rows_of(t: Tensor, bounds: Bounds) -> list[Tensor]:
    """Views (length, heads, D) of t (T, heads, D)."""
    return [t[start:end] for start, end in pairwise([0, *accumulate(bounds.lengths)])]


def attention_reference(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds) -> Tensor:
    """(T, heads, D): each row by itself."""
    rows = zip(rows_of(q, bounds), rows_of(k, bounds), rows_of(v, bounds), strict=True)
    return torch.cat([attention_of_row(*row, bounds.scores) for row in rows])


def attention_of_row(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    """Attention (length, heads, D) of one row.

    Of q (length, heads, D) and k, v (length, key heads, D).
    """
    q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    if scores.cap is not None:
        return capped(q, k, v, scores)
    length, seen = q.shape[1], None
    if scores.window is not None and scores.window < length:
        seen = visible(0, length, length, scores.window, q.device)
    return F.scaled_dot_product_attention(
        *(t.unsqueeze(0) for t in (q, k, v)), attn_mask=seen, is_causal=seen is None,
        scale=scores.scale_of(q.shape[-1]), enable_gqa=True,
    )[0].transpose(0, 1)  # fmt: skip


def visible(first: int, end: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Mask (queries, keys) bool: True where a query sees a key.

    Queries go from `first` to `end`.
    """
    query = torch.arange(first, end, device=device).unsqueeze(1)
    key = torch.arange(keys, device=device).unsqueeze(0)
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def capped(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    """Attention of one row with capped scores.

    In fp32, a block of queries at a time.

    q: (heads, length, D); k, v: (key heads, length, D). Returns (length, heads, D) in q's dtype.
    """
    length, cap = q.shape[1], scores.cap
    assert cap is not None
    wide = [t if t.dtype == torch.float64 else t.float() for t in (q, k, v)]
    groups = len(q) // len(k)
    k, v = (t.repeat_interleave(groups, 0) for t in wide[1:])
    outs = []
    for first in range(0, length, QUERIES):
        end = min(first + QUERIES, length)
        products = wide[0][:, first:end] @ k[:, :end].transpose(1, 2)  # (heads, queries, keys)
        bent = cap * torch.tanh(products * (scores.scale_of(q.shape[-1]) / cap))
        seen = visible(first, end, end, scores.window, q.device)
        outs.append(bent.masked_fill(~seen, -torch.inf).softmax(2) @ v[:, :end])
    return torch.cat(outs, dim=1).transpose(0, 1).to(q.dtype)


def attention_backward_reference(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bounds: Bounds
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend row by row: one row's scores in memory at a time."""
    found = []
    for slope, *row in zip(*(rows_of(t, bounds) for t in (grad, q, k, v)), strict=True):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_(True) for t in row]
            out = attention_of_row(leaves[0], leaves[1], leaves[2], bounds.scores)
        found.append(torch.autograd.grad(out, leaves, slope))
    dq, dk, dv = (torch.cat(one) for one in zip(*found, strict=True))
    return dq, dk, dv
