"""Triton kernels of attention_triton.py: forward, gradient of queries, gradient of keys.

WINDOWED: a token sees `window` tokens, itself the last; every step is masked then. CAPPED: a score
is cap * tanh(q k^T * bend), with bend = scale / cap. WIDE: a tensor has 2^31 elements or more, so
that a place times a stride needs 64 bits.
"""

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
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _seen(key, query, window, WINDOWED: tl.constexpr):
    """True where a query sees a key.

    Both have one dimension of length 1.
    """
    seen = key <= query
    if WINDOWED:
        seen = seen & (key > query - window)
    return seen


@triton.jit
def _begin(first, window, STEP: tl.constexpr, WINDOWED: tl.constexpr):
    """First key of a step that queries from `first` on see."""
    begin = first * 0
    if WINDOWED:
        begin = tl.maximum(first - window + 1, 0) // STEP * STEP
    return begin


@triton.jit
def _attend(
    mixed, total, top, q, k, v, k_stride, v_stride, query, first, length, scale, bend, cap, window,
    D: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """One step of `forward_kernel`: keys from `first` on."""
    key = first + tl.arange(0, STEP)
    scores = tl.dot(q, tl.trans(_rows(k, k_stride, key, length, D, MASKED)))  # (OWN, STEP)
    if CAPPED:
        scores = cap * _tanh(scores * bend)
        scale = 1.0
    if MASKED:
        seen = _seen(key[None, :], query[:, None], window, WINDOWED)
        scores = tl.where(seen, scores, float("-inf"))
    above = tl.maximum(top, tl.max(scores, 1) * scale)
    least = above
    if WINDOWED:  # a query may have seen no key yet
        least = tl.where(above == float("-inf"), 0.0, above)
    p = tl.exp2(scores * scale - least[:, None])
    shrink = tl.exp2(top - least)
    values = _rows(v, v_stride, key, length, D, MASKED)
    return (
        tl.dot(p.to(values.dtype), values, mixed * shrink[:, None]),
        total * shrink + tl.sum(p, 1),
        above,
    )


@triton.jit(do_not_specialize=["tokens"])
def forward_kernel(
    q, k, v, out, lse, table, tokens, q_stride, k_stride, v_stride, scale, bend, cap, window,
    GROUP: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
    SPLIT: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    head, heads, entry = tl.program_id(0), tl.num_programs(0), table + 4 * tl.program_id(1)
    start, length, first = tl.load(entry).to(tl.int64), tl.load(entry + 1), tl.load(entry + 2)
    width = heads * D
    if WIDE:
        q_stride, k_stride = q_stride.to(tl.int64), k_stride.to(tl.int64)
        v_stride, width = v_stride.to(tl.int64), width.to(tl.int64)
    query = first + tl.arange(0, OWN)
    q_rows = _rows(q + start * q_stride + head * D, q_stride, query, length, D, True)
    k += start * k_stride + head // GROUP * D
    v += start * v_stride + head // GROUP * D
    mixed, total = tl.zeros((OWN, D), tl.float32), tl.zeros((OWN,), tl.float32)
    # Finite after the first step, unless there is a window: every query sees the row's first key.
    top = tl.full((OWN,), float("-inf"), tl.float32)
    begin = _begin(first, window, STEP, WINDOWED)
    diagonal = begin
    if not WINDOWED and SPLIT:
        diagonal = first // STEP * STEP
    for key in range(begin, diagonal, STEP):
        mixed, total, top = _attend(
            mixed, total, top, q_rows, k, v, k_stride, v_stride, query, key, length,
            scale, bend, cap, window,
            D, STEP, False, CAPPED, WINDOWED,
        )  # fmt: skip
    for key in range(diagonal, tl.minimum(first + OWN, length), STEP):
        mixed, total, top = _attend(
            mixed, total, top, q_rows, k, v, k_stride, v_stride, query, key, length,
            scale, bend, cap, window,
            D, STEP, True, CAPPED, WINDOWED,
        )  # fmt: skip
    inside = query < length
    at = out + start * width + head * D + query[:, None] * width + tl.arange(0, D)[None, :]
    tl.store(at, (mixed / total[:, None]).to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(lse + head * tokens + start + query, top + tl.log2(total), mask=inside)


@triton.jit
def _to_queries(
    dq, q, grad, lse, delta, k, v, k_stride, v_stride, query, first, length,
    scale, bend, cap, window,
    D: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """One step of `queries_kernel`: keys from `first` on."""
    key = first + tl.arange(0, STEP)
    keys, values = (
        _rows(k, k_stride, key, length, D, MASKED),
        _rows(v, v_stride, key, length, D, MASKED),
    )
    scores = tl.dot(q, tl.trans(keys))  # (OWN, STEP)
    if CAPPED:
        bent = _tanh(scores * bend)
        scores = cap * bent
        scale = 1.0
    p = tl.exp2(scores * scale - lse[:, None])
    if MASKED:
        p = tl.where(_seen(key[None, :], query[:, None], window, WINDOWED), p, 0.0)
    slope = p * (tl.dot(grad, tl.trans(values)) - delta[:, None])
    if CAPPED:
        slope *= 1.0 - bent * bent
    return tl.dot(slope.to(keys.dtype), keys, dq)


@triton.jit(do_not_specialize=["tokens"])
def queries_kernel(
    grad, q, k, v, out, lse, sums, cos, sin, into, table, tokens,
    grad_stride, q_stride, k_stride, v_stride, out_stride, into_stride, scale, scale_2,
    bend, cap, window,
    GROUP: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
    SPLIT: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    head, entry = tl.program_id(0), table + 4 * tl.program_id(1)
    start, length, first = tl.load(entry).to(tl.int64), tl.load(entry + 1), tl.load(entry + 2)
    if WIDE:
        grad_stride, q_stride = grad_stride.to(tl.int64), q_stride.to(tl.int64)
        k_stride, v_stride = k_stride.to(tl.int64), v_stride.to(tl.int64)
        out_stride, into_stride = out_stride.to(tl.int64), into_stride.to(tl.int64)
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
    begin = _begin(first, window, STEP, WINDOWED)
    diagonal = begin
    if not WINDOWED and SPLIT:
        diagonal = first // STEP * STEP
    for key in range(begin, diagonal, STEP):
        dq = _to_queries(
            dq, q_rows, grads, log, delta, k, v, k_stride, v_stride, query, key, length,
            scale_2, bend, cap, window,
            D, STEP, False, CAPPED, WINDOWED,
        )  # fmt: skip
    for key in range(diagonal, tl.minimum(first + OWN, length), STEP):
        dq = _to_queries(
            dq, q_rows, grads, log, delta, k, v, k_stride, v_stride, query, key, length,
            scale_2, bend, cap, window,
            D, STEP, True, CAPPED, WINDOWED,
        )  # fmt: skip
    half = start * (D // 2)
    to = into + start * into_stride + head * D
    _store_turned_back(dq * scale, cos + half, sin + half, to, into_stride, query, length, OWN, D)


@triton.jit
def _to_keys(
    dk, dv, k, v, q, grad, sums, q_stride, grad_stride, key, first, length,
    scale, bend, cap, window,
    D: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
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
    scores = tl.dot(k, tl.trans(queries))  # (OWN, STEP), keys by queries
    if CAPPED:
        bent = _tanh(scores * bend)
        scores = cap * bent
        scale = 1.0
    p = tl.exp2(scores * scale - lse[None, :])
    if MASKED:
        p = tl.where(_seen(key[:, None], query[None, :], window, WINDOWED), p, 0.0)
    dv = tl.dot(p.to(grads.dtype), grads, dv)
    slope = p * (tl.dot(v, tl.trans(grads)) - delta[None, :])
    if CAPPED:
        slope *= 1.0 - bent * bent
    return tl.dot(slope.to(queries.dtype), queries, dk), dv


@triton.jit(do_not_specialize=["tokens"])
def keys_kernel(
    grad, q, k, v, sums, cos, sin, into, table, tokens,
    grad_stride, q_stride, k_stride, v_stride, into_stride, scale, scale_2, bend, cap, window,
    GROUP: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
    SPLIT: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    key_head, key_heads, entry = tl.program_id(0), tl.num_programs(0), table + 4 * tl.program_id(1)
    start, length, first = tl.load(entry).to(tl.int64), tl.load(entry + 1), tl.load(entry + 2)
    if WIDE:
        grad_stride, q_stride = grad_stride.to(tl.int64), q_stride.to(tl.int64)
        k_stride, v_stride = k_stride.to(tl.int64), v_stride.to(tl.int64)
        into_stride = into_stride.to(tl.int64)
    key = first + tl.arange(0, OWN)
    k_rows = _rows(k + start * k_stride + key_head * D, k_stride, key, length, D, True)
    v_rows = _rows(v + start * v_stride + key_head * D, v_stride, key, length, D, True)
    q += start * q_stride + key_head * GROUP * D
    grad += start * grad_stride + key_head * GROUP * D
    sums += (key_head * GROUP * tokens + start) * WIDTH
    dk, dv = tl.zeros((OWN, D), tl.float32), tl.zeros((OWN, D), tl.float32)
    end = length
    if WINDOWED:
        end = tl.minimum(length, first + OWN + window - 1)
    steps = tl.cdiv(end - first, STEP)  # of one head's walk
    near = steps  # of these, on the diagonal
    if not WINDOWED and SPLIT:
        near = tl.minimum(tl.cdiv(OWN, STEP), steps)
    far = steps - near
    for i in range(GROUP * near):
        head = i // near
        query = first + (i - head * near) * STEP
        dk, dv = _to_keys(
            dk, dv, k_rows, v_rows, q + head * D, grad + head * D, sums + head * tokens * WIDTH,
            q_stride, grad_stride, key, query, length, scale_2, bend, cap, window,
            D, STEP, True, CAPPED, WINDOWED,
        )  # fmt: skip
    for i in range(GROUP * far):
        head = i // far
        query = first + (near + i - head * far) * STEP
        dk, dv = _to_keys(
            dk, dv, k_rows, v_rows, q + head * D, grad + head * D, sums + head * tokens * WIDTH,
            q_stride, grad_stride, key, query, length, scale_2, bend, cap, window,
            D, STEP, False, CAPPED, WINDOWED,
        )  # fmt: skip
    half = start * (D // 2)
    to = into + start * into_stride + (key_heads * GROUP + key_head) * D
    _store_turned_back(dk * scale, cos + half, sin + half, to, into_stride, key, length, OWN, D)
    at = to + key_heads * D + key[:, None] * into_stride + tl.arange(0, D)[None, :]
    tl.store(at, dv.to(into.dtype.element_ty), mask=(key < length)[:, None])
