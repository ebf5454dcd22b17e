"""Rotary position embeddings in transformers' form.

Su et al. 2021, arXiv:2104.09864. The first half of a head is turned with the second.
"""

# pyright: reportCallIssue=false
# (a launch has options, num_warps say, that are no parameters of the kernel)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def angles(positions: Tensor, frequencies: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (T, D / 2) fp32.

    positions: (T,) int64, restarting at each row. frequencies: (D / 2,) fp32.
    """
    turned = positions.unsqueeze(1).to(torch.float32) * frequencies.to(torch.float32)
    return turned.cos() * scaling, turned.sin() * scaling


def rotate_reference(
    x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, back: bool = False
) -> None:
    """Turn each head of x (T, heads * D) by its position.

    The result goes to `out` (T, heads * D), which may be x. `back`: the other way (its gradient).
    """
    half = cos.shape[1]
    first, second = x.float().view(len(x), -1, 2, half).unbind(2)  # (T, heads, D / 2)
    c, s = cos.unsqueeze(1), (-sin if back else sin).unsqueeze(1)
    turned = torch.stack(
        [first * c - second * s, second * c + first * s], dim=2
    )  # (T, heads, 2, D / 2)
    out.copy_(turned.reshape(len(x), -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, back: bool = False) -> None:
    """As `rotate_reference`; on a GPU in one launch."""
    (rotate_triton if x.is_cuda else rotate_reference)(x, cos, sin, out, back=back)


def rotate_triton(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, back: bool = False) -> None:
    half = cos.shape[1]
    heads = x.shape[1] // (2 * half)
    _rotate[(len(x),)](
        x, cos, sin, out, x.stride(0), out.stride(0), heads, half,
        HEADS=triton.next_power_of_2(heads), HALF=triton.next_power_of_2(half), BACK=back,
        num_warps=4,
    )  # fmt: skip


@triton.jit
def _rotate(
    x, cos, sin, out, x_stride, out_stride, heads, half,
    HEADS: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, HALF)
    c = tl.load(cos + row * half + place, mask=place < half, other=0.0)[None, :]
    s = tl.load(sin + row * half + place, mask=place < half, other=0.0)[None, :]
    if BACK:
        s = -s
    head = tl.arange(0, HEADS)
    at = head[:, None] * (2 * half) + place[None, :]
    inside = (head[:, None] < heads) & (place[None, :] < half)
    first = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + row * x_stride + at + half, mask=inside, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    tl.store(out + row * out_stride + at, (first * c - second * s).to(kind), mask=inside)
    tl.store(out + row * out_stride + at + half, (second * c + first * s).to(kind), mask=inside)
