"""Attention of a long pass, some key heads at a time.

torch's kernels sum dq in fp32 and give each query head a dk and dv of its own: five times the size
of q. Heads are independent, so groups of them give the same bits with that divided by the groups.
A group's tensors are copies without gaps, so no kernel sees one of 2^31 elements or more.

Legend: see chunked.py.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from glassloop.engines.fused.attention import (
    Bounds,
    Kept,
    attention,
    attention_backward,
    gradients,
)
from glassloop.engines.fused.rotary import Angles, rotate
from glassloop.predict.chunks import GROUPS


def groups_of(heads: int, key_heads: int) -> list[tuple[slice, slice]]:
    """Query heads and key heads of each group, GROUPS at most."""
    share, step = heads // key_heads, -(-key_heads // GROUPS)
    keys = [slice(first, min(first + step, key_heads)) for first in range(0, key_heads, step)]
    return [(slice(one.start * share, one.stop * share), one) for one in keys]


def forward_by_groups(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds) -> Kept:
    """See attention.attention; `rest` has one entry a group."""
    if bounds.work is not None:  # this package's own kernel takes tensors of any size
        return attention(q, k, v, bounds)
    out, rests = q.new_empty(q.shape), []
    for queries, keys in groups_of(q.shape[1], k.shape[1]):
        kept = attention(*(own(t, h) for t, h in ((q, queries), (k, keys), (v, keys))), bounds)
        out[:, queries].copy_(kept.out)
        rests.append(kept.rest)
        del kept
    return Kept(out, tuple(rests))


def backward_by_groups(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Kept,
    bounds: Bounds,
    by: Angles,
    *,
    room: int = 0,
    chunk: int = 0,
) -> Tensor:
    """See attention.attention_backward; the matrix is made first here.

    kept: of `forward_by_groups`. chunk: places that are turned back at a time; 0: all.
    """
    if bounds.work is not None:
        return attention_backward(grad, q, k, v, kept, bounds, by, room=room)
    heads, key_heads, size = q.shape[1], k.shape[1], q.shape[2]
    into = q.new_empty(len(q), (heads + 2 * key_heads) * size + room)
    ends = (0, heads * size, (heads + key_heads) * size, (heads + 2 * key_heads) * size)
    to = [into[:, start:end].unflatten(1, (-1, size)) for start, end in pairwise(ends)]
    groups = groups_of(heads, key_heads)
    for (queries, keys), rest in zip(groups, kept.rest, strict=True):
        part = Kept(own(kept.out, queries), rest)
        parts = (own(t, h) for t, h in ((grad, queries), (q, queries), (k, keys), (v, keys)))
        found = gradients(*parts, part, bounds)
        for one, place, which in zip(found, to, (queries, keys, keys), strict=True):
            place[:, which].copy_(one)
        del found, one, part
    for start in range(0, len(q), chunk or len(q)):
        c = slice(start, start + (chunk or len(q)))
        turned = into[c, : ends[2]]
        rotate(turned, by.piece(c), turned, back=True)
    return into


def own(t: Tensor, heads: slice) -> Tensor:
    """(T, heads of a group, D): a copy without gaps."""
    return t[:, heads].contiguous()
