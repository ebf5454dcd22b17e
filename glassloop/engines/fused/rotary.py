"""Rotary position embeddings in transformers' forms.

Su et al. 2021, arXiv:2104.09864. In each head the first elements are turned by pairs: one half with
the other, or neighbours. The rest of a head, if there is one, stays.

Legend: T tokens, D head size, P pairs that are turned.
"""

# pyright: reportCallIssue=false
# (a launch has options, num_warps say, that are no parameters of the kernel)
from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from glassloop.engines.fused.launch import by_kernels, launch


@dataclass(frozen=True)
class Angles:
    """Turns of a pass's places.

    Tables of cosines and sines are made when they are asked for.

    Attributes:
        positions: (T,) int64, restarting at each row.
        frequencies: (P,) fp32.
        scaling: factor of cosines and sines.
        size: D.
        interleaved: neighbours make a pair; else element i and element i + P.
    """

    positions: Tensor
    frequencies: Tensor
    scaling: float
    size: int
    interleaved: bool = False

    @cached_property
    def cos(self) -> Tensor:
        """(T, P) fp32; kept from here on."""
        return self._turned.cos() * self.scaling

    @cached_property
    def sin(self) -> Tensor:
        """(T, P) fp32; kept from here on."""
        return self._turned.sin() * self.scaling

    @property
    def _turned(self) -> Tensor:
        return self.positions.unsqueeze(1).to(torch.float32) * self.frequencies.to(torch.float32)

    @property
    def pairs(self) -> int:
        """P."""
        return len(self.frequencies)

    @property
    def halves(self) -> bool:
        """True if one half of a head is turned with the other."""
        return 2 * self.pairs == self.size and not self.interleaved

    def piece(self, places: slice) -> Angles:
        """Turns of some places, with tables of their own."""
        return replace(self, positions=self.positions[places])


def angles(
    positions: Tensor,
    frequencies: Tensor,
    scaling: float,
    *,
    size: int | None = None,
    interleaved: bool = False,
) -> Angles:
    """Angles of a pass. `size`: D; None: 2 P."""
    size = 2 * len(frequencies) if size is None else size
    return Angles(positions, frequencies, scaling, size, interleaved)


def no_angles(tokens: int, size: int, device: torch.device) -> Angles:
    """Angles that leave every head as it is."""
    positions = torch.zeros(tokens, dtype=torch.int64, device=device)
    return Angles(positions, torch.zeros(size // 2, device=device), 1.0, size)


def rotate_reference(x: Tensor, by: Angles, out: Tensor, *, back: bool = False) -> None:
    """Turn each head of x (T, heads * D) by its position.

    The result goes to `out` (T, heads * D), which may be x. `back`: the other way (its gradient).
    """
    pairs = by.pairs
    heads = x.float().unflatten(1, (-1, by.size))  # (T, heads, D)
    part, rest = heads[..., : 2 * pairs], heads[..., 2 * pairs :]
    shape = (pairs, 2) if by.interleaved else (2, pairs)
    which = -1 if by.interleaved else -2
    first, second = part.unflatten(2, shape).unbind(which)  # (T, heads, P)
    c, s = by.cos.unsqueeze(1), (-by.sin if back else by.sin).unsqueeze(1)
    turned = torch.stack([first * c - second * s, second * c + first * s], dim=which)
    out.copy_(torch.cat([turned.flatten(2), rest], dim=2).flatten(1))


def rotate(x: Tensor, by: Angles, out: Tensor, *, back: bool = False) -> None:
    """As `rotate_reference`; on a GPU in one launch."""
    (rotate_triton if by_kernels(x) else rotate_reference)(x, by, out, back=back)


def rotate_triton(x: Tensor, by: Angles, out: Tensor, *, back: bool = False) -> None:
    pairs = by.pairs
    if 2 * pairs < by.size and out.data_ptr() != x.data_ptr():
        x = out.copy_(x)
    heads = x.shape[1] // by.size
    launch(
        _rotate, (len(x),),
        x, by.cos, by.sin, out, x.stride(0), out.stride(0), heads, by.size, pairs,
        HEADS=triton.next_power_of_2(heads), PAIRS=triton.next_power_of_2(pairs), BACK=back,
        INTERLEAVED=by.interleaved, num_warps=4,
    )  # fmt: skip


@triton.jit
def _rotate(
    x, cos, sin, out, x_stride, out_stride, heads, size, pairs,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, BACK: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PAIRS)
    c = tl.load(cos + row * pairs + place, mask=place < pairs, other=0.0)[None, :]
    s = tl.load(sin + row * pairs + place, mask=place < pairs, other=0.0)[None, :]
    if BACK:
        s = -s
    head = tl.arange(0, HEADS)
    inside = (head[:, None] < heads) & (place[None, :] < pairs)
    if INTERLEAVED:
        at = head[:, None] * size + 2 * place[None, :]
        beside = at + 1
    else:
        at = head[:, None] * size + place[None, :]
        beside = at + pairs
    first = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + row * x_stride + beside, mask=inside, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    tl.store(out + row * out_stride + at, (first * c - second * s).to(kind), mask=inside)
    tl.store(out + row * out_stride + beside, (second * c + first * s).to(kind), mask=inside)
