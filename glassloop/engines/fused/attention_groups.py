"""Attention of a long or shared pass, by groups of heads.

torch's kernels sum dq in fp32 and give each query head a dk and dv of its own: five times the size
of q. Heads are independent, so groups of them give the same bits with that divided by the groups.
A group's tensors are copies without gaps, so no kernel sees one of 2^31 elements or more. Where
ranks share a pass, each takes some heads of a group, and all places of them.

Legend: see chunked.py and exchange.py; P = T for a rank alone.
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
from glassloop.engines.fused.exchange import Exchange
from glassloop.engines.fused.rotary import Angles, rotate
from glassloop.plan.split import Heads, heads_of_ranks, in_groups
from glassloop.predict.chunks import GROUPS


def groups_of(
    heads: int, key_heads: int, exchange: Exchange | None, most: int
) -> list[list[Heads]]:
    """Heads by group and rank."""
    ranks = 1 if exchange is None else len(exchange.places)
    return in_groups(heads_of_ranks(heads, key_heads, ranks), heads // key_heads, most)


def forward_by_groups(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Bounds,
    exchange: Exchange | None = None,
    most: int = GROUPS,
) -> Kept:
    """See attention.attention; `rest` has one entry a group. q: (P, heads, D).

    most: groups. All ranks of an exchange take part.
    """
    if exchange is None and bounds.work is not None:
        return attention(q, k, v, bounds)  # this package's own kernel takes tensors of any size
    out, rests = q.new_empty(q.shape), []
    for group in groups_of(q.shape[1], k.shape[1], exchange, most):
        parts = gathered(group, exchange, q=(q,), kv=(k, v))
        kept = Kept(parts[0], ())
        if not _idle(group, exchange):
            kept = attention(parts[0], parts[1], parts[2], bounds)
        _spread(kept.out, [one.queries for one in group], exchange, out)
        rests.append(kept.rest)
        del kept, parts
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
    exchange: Exchange | None = None,
    most: int = GROUPS,
) -> Tensor:
    """See attention.attention_backward; the matrix is made first here.

    kept: of `forward_by_groups`, with the same exchange and `most`. chunk: places that are turned
    back at a time; 0: all.
    """
    if exchange is None and bounds.work is not None:
        return attention_backward(grad, q, k, v, kept, bounds, by, room=room)
    heads, key_heads, size = q.shape[1], k.shape[1], q.shape[2]
    into = q.new_empty(len(q), (heads + 2 * key_heads) * size + room)
    ends = (0, heads * size, (heads + key_heads) * size, (heads + 2 * key_heads) * size)
    to = [into[:, start:end].unflatten(1, (-1, size)) for start, end in pairwise(ends)]
    shared = exchange is not None and key_heads < len(exchange.places)
    if shared:
        into[:, ends[1] : ends[3]].zero_()  # several ranks have a share of one key head
    groups = groups_of(heads, key_heads, exchange, most)
    for group, rest in zip(groups, kept.rest, strict=True):
        parts = gathered(group, exchange, q=(grad, kept.out, q), kv=(k, v))
        found = parts[2], parts[3], parts[4]
        if not _idle(group, exchange):
            found = gradients(parts[0], *found, Kept(parts[1], rest), bounds)
        del parts
        for number, (one, place) in enumerate(zip(found, to, strict=True)):
            which = [share.keys if number else share.queries for share in group]
            _spread(one, which, exchange, place, add=shared and number > 0)
        del found, one
    for start in range(0, len(q), chunk or len(q)):
        c = slice(start, start + (chunk or len(q)))
        turned = into[c, : ends[2]]
        rotate(turned, by.piece(c), turned, back=True)
    return into


def _idle(group: list[Heads], exchange: Exchange | None) -> bool:
    """True if this rank has no heads in a group."""
    return group[0 if exchange is None else exchange.rank].none


def gathered(
    group: list[Heads],
    exchange: Exchange | None,
    *,
    q: tuple[Tensor, ...],
    kv: tuple[Tensor, ...],
) -> list[Tensor]:
    """Own heads of a group: copies without gaps.

    (T, own heads, D) of each tensor (P, heads, D), whose heads are those of q or of k and v.
    """
    queries, keys = [one.queries for one in group], [one.keys for one in group]
    return [
        t[:, heads[0]].contiguous() if exchange is None else exchange.to_heads(t, heads)
        for tensors, heads in ((q, queries), (kv, keys))
        for t in tensors
    ]


def _spread(
    t: Tensor,
    heads: list[slice],
    exchange: Exchange | None,
    into: Tensor,
    *,
    add: bool = False,
) -> None:
    """The reverse of `gathered`, to `into` (P, heads, D)."""
    if exchange is None:
        into[:, heads[0]].copy_(t)
    else:
        exchange.to_places(t, heads, into, add=add)
