"""Heads of each rank where ranks share a row's places.

A rank holds some places of every row of a pass. Attention needs all places: there each rank takes
some heads instead. A key head that fewer heads than ranks share is taken by several of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Heads:
    """Query and key heads of one rank in one group."""

    queries: slice
    keys: slice

    @property
    def none(self) -> bool:
        return self.queries.start == self.queries.stop


def heads_of_ranks(heads: int, key_heads: int, ranks: int) -> list[Heads]:
    """Heads of each rank.

    Raises ValueError naming execution.layout if they cannot be dealt.
    """
    share = heads // key_heads
    if key_heads >= ranks:
        ends = [key_heads * rank // ranks for rank in range(ranks + 1)]
        return [Heads(slice(a * share, b * share), slice(a, b)) for a, b in _pairs(ends)]
    each = ranks // key_heads  # ranks of a key head
    if ranks % key_heads or share < each:
        raise ValueError(
            f"execution.layout = split: {heads} query heads over {key_heads} key heads cannot be "
            f"dealt to {ranks} ranks; take {key_heads} ranks, or set execution.layout=packed"
        )
    found = []
    for key in range(key_heads):
        ends = [key * share + share * part // each for part in range(each + 1)]
        found += [Heads(slice(a, b), slice(key, key + 1)) for a, b in _pairs(ends)]
    return found


def in_groups(of_ranks: list[Heads], share: int, most: int) -> list[list[Heads]]:
    """Heads by group, at most `most`, and rank.

    A rank with few key heads has empty groups.

    Args:
        share: query heads of a key head.
    """
    keys = max(one.keys.stop - one.keys.start for one in of_ranks)
    step = -(-keys // most)
    groups = []
    for first in range(0, keys, step):
        group = []
        for one in of_ranks:
            a = min(one.keys.start + first, one.keys.stop)
            b = min(a + step, one.keys.stop)
            queries = slice(
                max(a * share, one.queries.start), max(min(b * share, one.queries.stop), a * share)
            )
            group.append(Heads(queries if a < b else slice(0, 0), slice(a, b)))
        groups.append(group)
    return groups


def places_of_ranks(tokens: int, ranks: int) -> tuple[int, ...]:
    """Places of each rank, in order, of a pass of `tokens` places."""
    return tuple(b - a for a, b in _pairs([tokens * rank // ranks for rank in range(ranks + 1)]))


def _pairs(ends: list[int]) -> list[tuple[int, int]]:
    return list(pairwise(ends))
