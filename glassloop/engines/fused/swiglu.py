"""The MLP's gate: act(gate) * up, in fp32, rounded once.

Shazeer 2020, arXiv:2002.05202. The activation is silu, or gelu in its approximation by tanh
(Hendrycks and Gimpel 2016, arXiv:1606.08415): x * sigmoid(2 a (x + b x^3)).
"""

# pyright: reportCallIssue=false
# (a launch has options, num_warps say, that are no parameters of the kernel)
from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from glassloop.engines.fused.launch import by_kernels, launch

BLOCK = 1024
A, B = 0.7978845608028654, 0.044715  # sqrt(2 / pi), and the cubic term's factor


def swiglu_reference(gate_up: Tensor, out: Tensor, *, gelu: bool = False) -> None:
    """Write act(gate) * up to `out` (T, I), any row stride.

    gate_up: (T, 2 I), gate first, any row stride. `gelu`: the activation, in place of silu.
    """
    gate, up = gate_up.float().chunk(2, dim=1)
    out.copy_((F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up)


def swiglu_backward_reference(grad: Tensor, gate_up: Tensor, *, gelu: bool = False) -> None:
    """Replace gate_up and grad by the gradient and the product, in place.

    gate_up (T, 2 I) becomes its gradient, and grad (T, I) of the product becomes the product
    itself.
    """
    gate, up = gate_up.float().chunk(2, dim=1)
    inner = 2 * A * (gate + B * gate**3) if gelu else gate
    slope = 2 * A * (1 + 3 * B * gate**2) if gelu else 1.0
    share, wide = torch.sigmoid(inner), grad.float()
    product = gate * share * up
    gate_slope = share * (1 + gate * (1 - share) * slope)
    gate_up.copy_(torch.cat([wide * up * gate_slope, wide * gate * share], dim=1))
    grad.copy_(product)


def swiglu(gate_up: Tensor, out: Tensor, *, gelu: bool = False) -> None:
    """As `swiglu_reference`; on a GPU in one launch."""
    (swiglu_triton if by_kernels(out) else swiglu_reference)(gate_up, out, gelu=gelu)


def swiglu_backward(grad: Tensor, gate_up: Tensor, *, gelu: bool = False) -> None:
    """As `swiglu_backward_reference`; on a GPU in one launch."""
    one = swiglu_backward_triton if by_kernels(grad) else swiglu_backward_reference
    one(grad, gate_up, gelu=gelu)


def swiglu_triton(gate_up: Tensor, out: Tensor, *, gelu: bool = False) -> None:
    rows, width = out.shape
    launch(
        _swiglu, (rows, triton.cdiv(width, BLOCK)),
        gate_up, out, gate_up.stride(0), out.stride(0), width, A, B,
        GELU=gelu, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


def swiglu_backward_triton(grad: Tensor, gate_up: Tensor, *, gelu: bool = False) -> None:
    rows, width = grad.shape
    launch(
        _swiglu_backward, (rows, triton.cdiv(width, BLOCK)),
        grad, gate_up, grad.stride(0), gate_up.stride(0), width, A, B,
        GELU=gelu, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


@triton.jit
def _swiglu(gate_up, out, stride, out_stride, width, a, b, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + column, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        share = tl.sigmoid(2.0 * a * (gate + b * gate * gate * gate))
    else:
        share = tl.sigmoid(gate)
    tl.store(
        out + row * out_stride + column,
        (gate * share * up).to(out.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def _swiglu_backward(
    grad, gate_up, grad_stride, stride, width, a, b, GELU: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate_at, grad_at = gate_up + row * stride + column, grad + row * grad_stride + column
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + width, mask=inside, other=0.0).to(tl.float32)
    wide = tl.load(grad_at, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        share = tl.sigmoid(2.0 * a * (gate + b * gate * gate * gate))
        rise = 2.0 * a * (1.0 + 3.0 * b * gate * gate)
        slope = share * (1.0 + gate * (1.0 - share) * rise)
    else:
        share = tl.sigmoid(gate)
        slope = share * (1.0 + gate * (1.0 - share))
    kind = grad.dtype.element_ty
    tl.store(gate_at, (wide * up * slope).to(kind), mask=inside)
    tl.store(gate_at + width, (wide * gate * share).to(kind), mask=inside)
    tl.store(grad_at, (gate * share * up).to(kind), mask=inside)
