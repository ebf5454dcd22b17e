"""Attention's gradient for some key heads at a time.

torch's kernels sum dq in fp32 and give each query head a dk and dv of its own: five times the size
of q. Heads are independent, so groups of them give the same bits with that divided by the groups.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from torch import Tensor

from glassloop.engines.fused.attention import Bounds, Kept, attention_backward, gradients
from glassloop.engines.fused.rotary import Angles, rotate
from glassloop.predict.chunks import GROUPS


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
) -> Tensor:
    """See attention.attention_backward; the matrix is made first here."""
    if bounds.work is not None:  # this package's own kernel takes nothing of that
        return attention_backward(grad, q, k, v, kept, bounds, by, room=room)
    heads, key_heads, size = q.shape[1], k.shape[1], q.shape[2]
    share, step = heads // key_heads, -(-key_heads // GROUPS)
    into = q.new_empty(len(q), (heads + 2 * key_heads) * size + room)
    ends = (0, heads * size, (heads + key_heads) * size, (heads + 2 * key_heads) * size)
    to = [into[:, start:end] for start, end in pairwise(ends)]
    for first in range(0, key_heads, step):
        keys = slice(first, min(first + step, key_heads))
        queries = slice(keys.start * share, keys.stop * share)
        part = heads_of(kept, bounds, queries)
        found = gradients(grad[:, queries], q[:, queries], k[:, keys], v[:, keys], part, bounds)
        for one, place, which in zip(found, to, (queries, keys, keys), strict=True):
            columns = place[:, which.start * size : which.stop * size]
            if place is to[2]:
                columns.copy_(one.flatten(1))
            else:
                rotate(one.flatten(1), by, columns, back=True)
        del found, one
    return into


def heads_of(kept: Kept, bounds: Bounds, queries: slice) -> Kept:
    """What forward kept of some query heads."""
    out = kept.out[:, queries]
    if bounds.kernel == "reference":
        return Kept(out, ())
    # Log-sum-exp: (heads, T) of "flash", (rows, heads, length, ...) of older ones and of "cudnn".
    lse, *rest = kept.rest
    part = lse[queries] if lse.dim() == 2 else lse[:, queries]
    return replace(kept, out=out, rest=(part.contiguous(), *rest))
