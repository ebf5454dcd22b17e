"""The MLP's gate: silu(gate) * up, in fp32, rounded once.

Shazeer 2020, arXiv:2002.05202.
"""

# pyright: reportCallIssue=false
# (a launch has options, num_warps say, that are no parameters of the kernel)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def swiglu_reference(gate_up: Tensor, out: Tensor) -> None:
    """Write silu(gate) * up to `out` (T, I), any row stride.

    gate_up: (T, 2 I), gate first, any row stride.
    """
    gate, up = gate_up.float().chunk(2, dim=1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def swiglu_backward_reference(grad: Tensor, gate_up: Tensor) -> None:
    """Replace gate_up and grad by the gradient and the product, in place.

    gate_up (T, 2 I) becomes its gradient, and grad (T, I) of the product becomes the product
    itself.
    """
    gate, up = gate_up.float().chunk(2, dim=1)
    share, wide = torch.sigmoid(gate), grad.float()
    product = gate * share * up
    gate_up.copy_(
        torch.cat([wide * up * share * (1 + gate * (1 - share)), wide * gate * share], dim=1)
    )
    grad.copy_(product)


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """As `swiglu_reference`; on a GPU in one launch."""
    (swiglu_triton if out.is_cuda else swiglu_reference)(gate_up, out)


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> None:
    """As `swiglu_backward_reference`; on a GPU in one launch."""
    (swiglu_backward_triton if grad.is_cuda else swiglu_backward_reference)(grad, gate_up)


def swiglu_triton(gate_up: Tensor, out: Tensor) -> None:
    rows, width = out.shape
    _swiglu[(rows, triton.cdiv(width, BLOCK))](
        gate_up, out, gate_up.stride(0), out.stride(0), width, BLOCK=BLOCK, num_warps=4
    )


def swiglu_backward_triton(grad: Tensor, gate_up: Tensor) -> None:
    rows, width = grad.shape
    _swiglu_backward[(rows, triton.cdiv(width, BLOCK))](
        grad, gate_up, grad.stride(0), gate_up.stride(0), width, BLOCK=BLOCK, num_warps=4
    )


@triton.jit
def _swiglu(gate_up, out, stride, out_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(
        out + row * out_stride + column,
        (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def _swiglu_backward(grad, gate_up, grad_stride, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate_at, grad_at = gate_up + row * stride + column, grad + row * grad_stride + column
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + width, mask=inside, other=0.0).to(tl.float32)
    wide = tl.load(grad_at, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    kind = grad.dtype.element_ty
    tl.store(gate_at, (wide * up * share * (1.0 + gate * (1.0 - share))).to(kind), mask=inside)
    tl.store(gate_at + width, (wide * gate * share).to(kind), mask=inside)
    tl.store(grad_at, (gate * share * up).to(kind), mask=inside)
