"""NF4 weights that share an input, stacked.

This is the form in which they are stored, streamed and read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

MOST_MEMBERS = 3  # q, k, v
SCALE_BLOCK = 256  # absmax that share a second-level scale


@dataclass(frozen=True)
class Packed:
    """NF4 weights stacked by rows: (N, K) in all.

    The model's own weights are views of these.

    Attributes:
        codes: (N * K / 2,) uint8, two weights a byte, the first in the high half.
        absmax: (N * K / blocksize,) uint8 with double quantisation, else fp32.
        scales: fp32, one for 256 absmax, starting anew at each member; empty without double
            quantisation.
        table: (256,) fp32, what an 8-bit absmax stands for; empty without double quantisation.
        offsets: (members,) fp32, added to each member's absmax; empty without it.
        levels: (16,) fp32, what a code stands for.
        rows: N of each member.
        columns: K.
        blocksize: weights that share an absmax.
    """

    codes: Tensor
    absmax: Tensor
    scales: Tensor
    table: Tensor
    offsets: Tensor
    levels: Tensor
    rows: tuple[int, ...]
    columns: int
    blocksize: int

    @property
    def nested(self) -> bool:
        return self.absmax.dtype.itemsize == 1

    @cached_property
    def starts(self) -> list[int]:
        """First row of each member; past the end for a missing one."""
        return [sum(self.rows[:member]) for member in range(MOST_MEMBERS)]

    @cached_property
    def befores(self) -> list[int]:
        """Offset of each member's scales."""
        return [self.scales_before(member) for member in range(MOST_MEMBERS)]

    def scales_before(self, member: int) -> int:
        """Offset of the scales of a member."""
        return sum(
            -(-rows * self.columns // self.blocksize // SCALE_BLOCK) for rows in self.rows[:member]
        )
