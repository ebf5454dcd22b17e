"""Exchange of places and heads between the ranks of a split pass.

Outside of attention a rank has all heads of its own places. In attention it has all places of its
own heads (Jacobs et al. 2023, arXiv:2309.14509). Each way is one all-to-all.

Legend: P places of this rank, T of all ranks, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from glassloop.data.rows import Part


@dataclass(frozen=True)
class Exchange:
    """Places of each rank, in the order of the pass."""

    rank: int
    places: tuple[int, ...]

    def to_heads(self, t: Tensor, heads: Sequence[slice]) -> Tensor:
        """(T, own heads, D), without gaps, of t (P, all heads, D).

        `heads`: each rank's. All ranks take part.
        """
        size, own = t.shape[2], _count(heads[self.rank])
        sent = torch.cat([t[:, one].flatten() for one in heads])
        received = t.new_empty(sum(self.places) * own * size)
        leave = [len(t) * _count(one) * size for one in heads]
        all_to_all(received, sent, [count * own * size for count in self.places], leave)
        return received.view(sum(self.places), own, size)

    def to_places(
        self, t: Tensor, heads: Sequence[slice], into: Tensor, *, add: bool = False
    ) -> None:
        """Write what ranks have for these places, or add it.

        into: (P, all heads, D). t: (T, own heads, D). The ranks' parts are added in their order.
        All ranks take part.
        """
        size, own = into.shape[2], _count(heads[self.rank])
        arrive = [len(into) * _count(one) * size for one in heads]
        received = into.new_empty(sum(arrive))
        leave = [count * own * size for count in self.places]
        all_to_all(received, t.contiguous().flatten(), arrive, leave)
        for part, one in zip(received.split(arrive), heads, strict=True):
            found = part.view(len(into), _count(one), size)
            into[:, one].add_(found) if add else into[:, one].copy_(found)


def all_to_all(received: Tensor, sent: Tensor, arrive: list[int], leave: list[int]) -> None:
    """Exchange parts of flat tensors.

    `leave` elements go to each rank, `arrive` come from each.
    """
    if sent.is_cuda and dist.get_backend() == "gloo":  # ranks that share a card
        on_host = torch.empty_like(received, device="cpu")
        dist.all_to_all_single(on_host, sent.cpu(), arrive, leave)
        received.copy_(on_host)
        return
    dist.all_to_all_single(received, sent, arrive, leave)


def rows_of_all(by_row: Tensor, part: Part) -> Tensor:
    """Sum of rows over the ranks that share a pass.

    (rows,) on rank 0, (0,) on others; by_row: (rows,) fp32, of this rank's places. All ranks take
    part.
    """
    dist.all_reduce(by_row)
    return by_row if part.rank == 0 else by_row[:0]


def _count(heads: slice) -> int:
    return heads.stop - heads.start
