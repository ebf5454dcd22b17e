"""Triton kernels of attention_triton.py: forward, gradient of queries, gradient of keys."""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers that `queries` leaves of each query for `keys`. Two of the four count: a load of fewer is
# not shared out among the threads, each would load what all others do.
WIDTH = tl.constexpr(4)


@triton.jit
def _rows(base, stride, place, length, D: tl.constexpr, MASKED: tl.constexpr):
    """(places, D) of a row; 0 beyond its length.

    The row begins at `base`.
    """
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
    """One step of `forward_kernel`: keys from `first` on."""
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
def forward_kernel(
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
    """One step of `queries_kernel`: keys from `first` on."""
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
def queries_kernel(
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
    """One step of `keys_kernel`: queries of a head from `first` on.

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
def keys_kernel(
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
