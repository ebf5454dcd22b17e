"""Many small matrices copied or added elsewhere in one launch.

Adapters go to their 16-bit form, their gradients to where they add up.
"""

# pyright: reportCallIssue=false
# (a launch has options, num_warps say, that are no parameters of the kernel)
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from glassloop.engines.fused.launch import by_kernels, launch

BLOCK = 1024  # elements; with four times as many its addresses spill from registers


@dataclass(frozen=True)
class Move:
    """A move: `to` becomes `source * scaling`, or gains it.

    Both are (rows, columns) with contiguous columns, in any two dtypes.
    """

    source: Tensor
    to: Tensor
    scaling: float = 1.0


def move_reference(moves: list[Move], *, add: bool) -> None:
    for one in moves:
        value = one.source if one.scaling == 1 else one.source * one.scaling
        one.to.add_(value) if add else one.to.copy_(value)


class Moves:
    """Moves between places that stay.

    All sources have one dtype, all targets have one.
    """

    def __init__(self, moves: list[Move]):
        assert len({(one.source.dtype, one.to.dtype) for one in moves}) <= 1
        assert all(
            one.source.shape == one.to.shape and one.source.stride(1) == one.to.stride(1) == 1
            for one in moves
        )
        self.moves = moves
        self.table: Tensor | None = None

    def carry_out(self, *, add: bool) -> None:
        """Do all moves; on a GPU in one launch.

        A layer without adapters has none.
        """
        if not self.moves:
            return
        if not by_kernels(self.moves[0].to):
            return move_reference(self.moves, add=add)
        self.carry_out_triton(add=add)

    def carry_out_triton(self, *, add: bool) -> None:
        first = self.moves[0]
        if self.table is None:
            rows = [
                (
                    one.source.data_ptr(),
                    one.to.data_ptr(),
                    one.to.numel(),
                    one.to.shape[1],
                    one.source.stride(0),
                    one.to.stride(0),
                )
                for one in self.moves
            ]
            self.table = torch.tensor(rows, dtype=torch.int64).to(first.to.device)  # (moves, 6)
            self.scalings = torch.tensor(
                [one.scaling for one in self.moves], dtype=torch.float32
            ).to(first.to.device)
            self.grid = (len(rows), triton.cdiv(max(one.to.numel() for one in self.moves), BLOCK))
        launch(
            _move,
            self.grid,
            self.table,
            self.scalings,
            first.source,
            first.to,
            ADD=add,
            BLOCK=BLOCK,
            num_warps=4,
        )


@triton.jit
def _move(table, scalings, kind_of_source, kind_of_target, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """`kind_of_...` are there for their dtype alone."""
    row = table + tl.program_id(0) * 6
    size, columns = tl.load(row + 2), tl.load(row + 3)
    place = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(1) * BLOCK < size:
        inside = place < size
        source = tl.load(row).to(tl.pointer_type(kind_of_source.dtype.element_ty))
        target = tl.load(row + 1).to(tl.pointer_type(kind_of_target.dtype.element_ty))
        at, column = place // columns, place % columns
        value = tl.load(source + at * tl.load(row + 4) + column, mask=inside, other=0.0).to(
            tl.float32
        )
        value *= tl.load(scalings + tl.program_id(0))
        to = target + at * tl.load(row + 5) + column
        if ADD:
            value += tl.load(to, mask=inside, other=0.0).to(tl.float32)
        tl.store(to, value.to(kind_of_target.dtype.element_ty), mask=inside)
