"""Block sizes of attention_triton.py's kernels, and a pass's programs.

One table holds the blocks of all its rows. The programs with the longest walk come first: a GPU
hands them out in that order, and the short ones fill its end.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """Block sizes of one kernel.

    Attributes:
        own: tokens of a program's block.
        step: tokens of a step of its walk.
        split: steps that touch the diagonal have a loop of their own, the others need no mask
            then; False: one loop, masked throughout.
    """

    own: int
    step: int
    warps: int
    stages: int
    split: bool = True


@dataclass(frozen=True)
class Scores:
    """The way from a row's q and k to softmax scores.

    Attributes:
        scale: factor of q k^T; None: D ** -0.5.
        cap: c of c tanh(score / c); None: no cap.
        window: tokens that a token sees, itself included; None: all before it.
    """

    scale: float | None = None
    cap: float | None = None
    window: int | None = None

    def scale_of(self, size: int) -> float:
        return size**-0.5 if self.scale is None else self.scale


PLAIN = Scores()


@dataclass(frozen=True)
class Tiles:
    forward: Tile
    queries: Tile
    keys: Tile


# By head size. Those of 128 were the quickest of some thirty on an H100, for rows of 240 to 1,200
# tokens.
# Heads of 256 have none: with them a Gemma 3 12B was slower on an H200 than with torch's kernel.
TILES = {
    64: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
    128: Tiles(Tile(64, 64, 4, 3, split=False), Tile(64, 32, 4, 3), Tile(64, 32, 4, 3)),
}


@dataclass(frozen=True)
class Work:
    """Programs of each kernel, (programs, 4) int32 on the device.

    Row's start in the pass, row's length, block's start in the row, 0.
    """

    tiles: Tiles
    forward: Tensor
    queries: Tensor
    keys: Tensor
    scores: Scores = PLAIN


def programs(lengths: tuple[int, ...], tiles: Tiles) -> list[list[int]]:
    """The three tables of `Work`, flat.

    Four numbers an entry keep each table's address a multiple of 16 bytes.
    """
    return [
        _heaviest_first(lengths, tiles.forward.own),
        _heaviest_first(lengths, tiles.queries.own),
        _heaviest_first(lengths, tiles.keys.own, to_the_end=True),
    ]


def _heaviest_first(lengths: tuple[int, ...], own: int, *, to_the_end: bool = False) -> list[int]:
    found, start = [], 0
    for length in lengths:
        found += [
            (length - first if to_the_end else first, (start, length, first, 0))
            for first in range(0, length, own)
        ]
        start += length
    found.sort(key=lambda one: one[0], reverse=True)
    return [number for _, entry in found for number in entry]
