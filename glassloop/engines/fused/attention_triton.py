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

import torch
import triton
import triton.language as tl
from torch import Tensor

from glassloop.engines.fused.attention_work import Work

# Numbers that `queries` leaves of each query for `keys`. Two of the four count: a load of fewer is
# not shared out among the threads, each would load what all others do.
WIDTH = tl.constexpr(4)


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
    _forward[(heads, len(work.forward))](
        q, k, v, out, lse, work.forward, tokens, q.stride(0), k.stride(0), v.stride(0),
        size**-0.5 * math.log2(math.e),
        GROUP=heads // k.shape[1], D=size, OWN=tile.own, STEP=tile.step, SPLIT=tile.split,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cos: Tensor,
    sin: Tensor,
    work: Work,
    into: Tensor,
) -> None:
    """Write the gradients of q, k (before they were turned) and v.

    They go to `into` (T, (heads + 2 key heads) * D), any row stride.

    Args:
        grad: (T, heads, D), of the output. out, lse: as `forward` gave them.
        cos, sin: (T, D / 2) fp32, by which q and k were turned.
    """
    sums = lse.new_empty(*lse.shape, WIDTH.value)
    gradient_of_queries(grad, q, k, v, out, lse, sums, cos, sin, work, into)
    gradient_of_keys(grad, q, k, v, sums, cos, sin, work, into)


def gradient_of_queries(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sums: Tensor,
    cos: Tensor, sin: Tensor, work: Work, into: Tensor,
) -> None:  # fmt: skip
    """Write the first heads * D columns of `into`, and `sums`.

    `sums` (heads, T, WIDTH) fp32: the log-sum-exp at 0, delta at WIDTH / 2.
    """
    tokens, heads, size = _checked(q, k, v, grad, out)
    assert cos.is_contiguous() and sin.is_contiguous() and into.stride(1) == 1
    tile, scale = work.tiles.queries, size**-0.5
    _queries[(heads, len(work.queries))](
        grad, q, k, v, out, lse, sums, cos, sin, into, work.queries, tokens,
        grad.stride(0), q.stride(0), k.stride(0), v.stride(0), out.stride(0), into.stride(0),
        scale, scale * math.log2(math.e),
        GROUP=heads // k.shape[1], D=size, OWN=tile.own, STEP=tile.step, SPLIT=tile.split,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def gradient_of_keys(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sums: Tensor,
    cos: Tensor,
    sin: Tensor,
    work: Work,
    into: Tensor,
) -> None:
    """The other columns of `into`: of k, then of v."""
    tokens, heads, size = _checked(q, k, v, grad)
    tile, scale = work.tiles.keys, size**-0.5
    _keys[(k.shape[1], len(work.keys))](
        grad, q, k, v, sums, cos, sin, into, work.keys, tokens,
        grad.stride(0), q.stride(0), k.stride(0), v.stride(0), into.stride(0),
        scale, scale * math.log2(math.e),
        GROUP=heads // k.shape[1], D=size, OWN=tile.own, STEP=tile.step, SPLIT=tile.split,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _checked(*parts: Tensor) -> tuple[int, int, int]:
    """Tokens, heads and size of the first tensor.

    All have their heads side by side.
    """
    assert all(t.stride(2) == 1 and t.stride(1) == t.shape[2] for t in parts)
    tokens, heads, size = parts[0].shape
    assert size >= 16 and size & (size - 1) == 0 and heads % parts[1].shape[1] == 0
    return tokens, heads, size


@triton.jit
def _rows(base, stride, place, length, D: tl.constexpr, MASKED: tl.constexpr):
    """(places, D) of a row that begins at `base`; 0 beyond its length."""
    at = base + place[:, None] * stride + tl.arange(0, D)[None, :]
    if MASKED:
        return tl.load(at, mask=(place < length)[:, None], other=0.0)
    return tl.load(at)


@triton.jit
def _store_turned_back(
    tile, cos, sin, to, stride, place, length, OWN: tl.constexpr, D: tl.constexpr
):
    """Turn (OWN, D) against the positions and write it.

    All pointers are the row's.
    """
    HALF: tl.constexpr = D // 2
    first, second = tl.split(
        tl.permute(tl.reshape(tile, (OWN, 2, HALF)), (0, 2, 1))
    )  # (OWN, D / 2)
    column, inside = tl.arange(0, HALF)[None, :], (place < length)[:, None]
    c = tl.load(cos + place[:, None] * HALF + column, mask=inside, other=0.0)
    s = tl.load(sin + place[:, None] * HALF + column, mask=inside, other=0.0)
    kind = to.dtype.element_ty
    at = to + place[:, None] * stride + column
    tl.store(at, (first * c + second * s).to(kind), mask=inside)
    tl.store(at + HALF, (second * c - first * s).to(kind), mask=inside)


@triton.jit
def _attend(
    mixed, total, top, q, k, v, k_stride, v_stride, query, first, length, scale,
    D: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of `_forward`: keys from `first` on."""
    key = first + tl.arange(0, STEP)
    scores = tl.dot(q, tl.trans(_rows(k, k_stride, key, length, D, MASKED)))  # (OWN, STEP)
    if MASKED:
        scores = tl.where(key[None, :] <= query[:, None], scores, float("-inf"))
    above = tl.maximum(top, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - above[:, None])
    shrink = tl.exp2(top - above)
    values = _rows(v, v_stride, key, length, D, MASKED)
    return (
        tl.dot(p.to(values.dtype), values, mixed * shrink[:, None]),
        total * shrink + tl.sum(p, 1),
        above,
    )


@triton.jit(do_not_specialize=["tokens"])
def _forward(
    q, k, v, out, lse, table, tokens, q_stride, k_stride, v_stride, scale,
    GROUP: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    head, heads, entry = tl.program_id(0), tl.num_programs(0), table + 4 * tl.program_id(1)
    start, length, first = tl.load(entry).to(tl.int64), tl.load(entry + 1), tl.load(entry + 2)
    query = first + tl.arange(0, OWN)
    q_rows = _rows(q + start * q_stride + head * D, q_stride, query, length, D, True)
    k += start * k_stride + head // GROUP * D
    v += start * v_stride + head // GROUP * D
    mixed, total = tl.zeros((OWN, D), tl.float32), tl.zeros((OWN,), tl.float32)
    top = tl.full(
        (OWN,), float("-inf"), tl.float32
    )  # finite after the first step: every query sees the row's first key
    diagonal = first // STEP * STEP if SPLIT else 0
    for key in range(0, diagonal, STEP):
        mixed, total, top = _attend(
            mixed,
            total,
            top,
            q_rows,
            k,
            v,
            k_stride,
            v_stride,
            query,
            key,
            length,
            scale,
            D,
            STEP,
            False,
        )
    for key in range(diagonal, tl.minimum(first + OWN, length), STEP):
        mixed, total, top = _attend(
            mixed,
            total,
            top,
            q_rows,
            k,
            v,
            k_stride,
            v_stride,
            query,
            key,
            length,
            scale,
            D,
            STEP,
            True,
        )
    inside = query < length
    at = (
        out + start * heads * D + head * D + query[:, None] * (heads * D) + tl.arange(0, D)[None, :]
    )
    tl.store(at, (mixed / total[:, None]).to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(lse + head * tokens + start + query, top + tl.log2(total), mask=inside)


@triton.jit
def _to_queries(
    dq, q, grad, lse, delta, k, v, k_stride, v_stride, query, first, length, scale,
    D: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of `_queries`: keys from `first` on."""
    key = first + tl.arange(0, STEP)
    keys, values = (
        _rows(k, k_stride, key, length, D, MASKED),
        _rows(v, v_stride, key, length, D, MASKED),
    )
    p = tl.exp2(tl.dot(q, tl.trans(keys)) * scale - lse[:, None])  # (OWN, STEP)
    if MASKED:
        p = tl.where(key[None, :] <= query[:, None], p, 0.0)
    slope = p * (tl.dot(grad, tl.trans(values)) - delta[:, None])
    return tl.dot(slope.to(keys.dtype), keys, dq)


@triton.jit(do_not_specialize=["tokens"])
def _queries(
    grad, q, k, v, out, lse, sums, cos, sin, into, table, tokens,
    grad_stride, q_stride, k_stride, v_stride, out_stride, into_stride, scale, scale_2,
    GROUP: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    head, entry = tl.program_id(0), table + 4 * tl.program_id(1)
    start, length, first = tl.load(entry).to(tl.int64), tl.load(entry + 1), tl.load(entry + 2)
    query = first + tl.arange(0, OWN)
    inside, place = query < length, head * tokens + start + query
    q_rows = _rows(q + start * q_stride + head * D, q_stride, query, length, D, True)
    grads = _rows(grad + start * grad_stride + head * D, grad_stride, query, length, D, True)
    outs = _rows(out + start * out_stride + head * D, out_stride, query, length, D, True)
    delta = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)
    log = tl.load(lse + place, mask=inside, other=0.0)
    tl.store(sums + place * WIDTH, log, mask=inside)
    tl.store(sums + place * WIDTH + WIDTH // 2, delta, mask=inside)
    k += start * k_stride + head // GROUP * D
    v += start * v_stride + head // GROUP * D
    dq = tl.zeros((OWN, D), tl.float32)
    diagonal = first // STEP * STEP if SPLIT else 0
    for key in range(0, diagonal, STEP):
        dq = _to_queries(
            dq,
            q_rows,
            grads,
            log,
            delta,
            k,
            v,
            k_stride,
            v_stride,
            query,
            key,
            length,
            scale_2,
            D,
            STEP,
            False,
        )
    for key in range(diagonal, tl.minimum(first + OWN, length), STEP):
        dq = _to_queries(
            dq,
            q_rows,
            grads,
            log,
            delta,
            k,
            v,
            k_stride,
            v_stride,
            query,
            key,
            length,
            scale_2,
            D,
            STEP,
            True,
        )
    half = start * (D // 2)
    to = into + start * into_stride + head * D
    _store_turned_back(dq * scale, cos + half, sin + half, to, into_stride, query, length, OWN, D)


@triton.jit
def _to_keys(
    dk, dv, k, v, q, grad, sums, q_stride, grad_stride, key, first, length, scale,
    D: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of `_keys`: queries of a head from `first` on.

    Beyond the row's end grad and delta are 0, and so is what they add.
    """
    query = first + tl.arange(0, STEP)
    inside = query < length
    queries, grads = (
        _rows(q, q_stride, query, length, D, True),
        _rows(grad, grad_stride, query, length, D, True),
    )
    known = tl.load(
        sums + query[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :],
        mask=inside[:, None],
        other=0.0,
    )
    known, _ = tl.split(tl.reshape(known, (STEP, WIDTH // 2, 2)))
    lse, delta = tl.split(known)  # (STEP,)
    p = tl.exp2(tl.dot(k, tl.trans(queries)) * scale - lse[None, :])  # (OWN, STEP), keys by queries
    if MASKED:
        p = tl.where(key[:, None] <= query[None, :], p, 0.0)
    dv = tl.dot(p.to(grads.dtype), grads, dv)
    slope = p * (tl.dot(v, tl.trans(grads)) - delta[None, :])
    return tl.dot(slope.to(queries.dtype), queries, dk), dv


@triton.jit(do_not_specialize=["tokens"])
def _keys(
    grad, q, k, v, sums, cos, sin, into, table, tokens,
    grad_stride, q_stride, k_stride, v_stride, into_stride, scale, scale_2,
    GROUP: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    key_head, key_heads, entry = tl.program_id(0), tl.num_programs(0), table + 4 * tl.program_id(1)
    start, length, first = tl.load(entry).to(tl.int64), tl.load(entry + 1), tl.load(entry + 2)
    key = first + tl.arange(0, OWN)
    k_rows = _rows(k + start * k_stride + key_head * D, k_stride, key, length, D, True)
    v_rows = _rows(v + start * v_stride + key_head * D, v_stride, key, length, D, True)
    q += start * q_stride + key_head * GROUP * D
    grad += start * grad_stride + key_head * GROUP * D
    sums += (key_head * GROUP * tokens + start) * WIDTH
    dk, dv = tl.zeros((OWN, D), tl.float32), tl.zeros((OWN, D), tl.float32)
    steps = tl.cdiv(length - first, STEP)  # of one head's walk
    near = tl.minimum(tl.cdiv(OWN, STEP), steps) if SPLIT else steps  # of these, on the diagonal
    far = steps - near
    for i in range(GROUP * near):
        head = i // near
        query = first + (i - head * near) * STEP
        dk, dv = _to_keys(
            dk, dv, k_rows, v_rows, q + head * D, grad + head * D, sums + head * tokens * WIDTH,
            q_stride, grad_stride, key, query, length, scale_2, D, STEP, True,
        )  # fmt: skip
    for i in range(GROUP * far):
        head = i // far
        query = first + (near + i - head * far) * STEP
        dk, dv = _to_keys(
            dk, dv, k_rows, v_rows, q + head * D, grad + head * D, sums + head * tokens * WIDTH,
            q_stride, grad_stride, key, query, length, scale_2, D, STEP, False,
        )  # fmt: skip
    half = start * (D // 2)
    to = into + start * into_stride + (key_heads * GROUP + key_head) * D
    _store_turned_back(dk * scale, cos + half, sin + half, to, into_stride, key, length, OWN, D)
    at = to + key_heads * D + key[:, None] * into_stride + tl.arange(0, D)[None, :]
    tl.store(at, dv.to(into.dtype.element_ty), mask=(key < length)[:, None])
