"""RMS norms, with the residual additions around them.

Zhang and Sennrich 2019, arXiv:1910.07467. The residual is added before the norm, and in its
gradient. Everything is computed in fp32 and rounded once.
"""

# pyright: reportCallIssue=false
# (a launch has options, num_warps say, that are no parameters of the kernel)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def add_norm_reference(
    x: Tensor, y: Tensor | None, weight: Tensor, eps: float, out: Tensor
) -> Tensor:
    """Write weight * s / rms(s), with s = x + y.

    It goes to `out` (T, H), any row stride. Returns s (T, H), which is x itself without y.
    """
    s = x if y is None else (x.float() + y.float()).to(x.dtype)
    wide = s.float()
    out.copy_(wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float())
    return s


def norm_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, into: Tensor
) -> None:
    """Add the norm's gradient in x to `into`.

    The norm is weight * x / rms(x). `into`: (T, H), any row stride. grad: (T, H) of its output.
    """
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)  # (T, 1)
    unit, inner = wide * rstd, grad.float() * weight.float()
    into.copy_(into.float() + rstd * (inner - unit * (inner * unit).mean(-1, keepdim=True)))


def add_norm(x: Tensor, y: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """As `add_norm_reference`; on a GPU in one launch."""
    return (add_norm_triton if x.is_cuda else add_norm_reference)(x, y, weight, eps, out)


def norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, into: Tensor) -> None:
    """As `norm_backward_reference`; on a GPU in one launch."""
    (norm_backward_triton if x.is_cuda else norm_backward_reference)(grad, x, weight, eps, into)


def add_norm_triton(x: Tensor, y: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    rows, width = x.shape
    s = x if y is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _add_norm[(rows,)](
        x, s if y is None else y, weight, s, out,
        x.stride(0), 0 if y is None else y.stride(0), out.stride(0), width, eps,
        ADD=y is not None, BLOCK=triton.next_power_of_2(width), num_warps=_warps(width),
    )  # fmt: skip
    return s


def norm_backward_triton(grad: Tensor, x: Tensor, weight: Tensor, eps: float, into: Tensor) -> None:
    rows, width = x.shape
    _norm_backward[(rows,)](
        grad, x, weight, into, grad.stride(0), x.stride(0), into.stride(0), width, eps,
        BLOCK=triton.next_power_of_2(width), num_warps=_warps(width),
    )  # fmt: skip


def _warps(width: int) -> int:
    return 4 if width <= 1024 else 8


@triton.jit
def _add_norm(
    x, y, weight, s, out, x_stride, y_stride, out_stride, width, eps,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    total = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        total += tl.load(y + row * y_stride + column, mask=inside, other=0.0).to(tl.float32)
        rounded = total.to(s.dtype.element_ty)
        tl.store(s + row * width + column, rounded, mask=inside)
        total = rounded.to(tl.float32)  # what backward will see
    rstd = 1.0 / tl.sqrt(tl.sum(total * total) / width + eps)
    normed = total * rstd * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward(
    grad, x, weight, into, grad_stride, x_stride, into_stride, width, eps, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    wide = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    inner = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    inner *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(wide * wide) / width + eps)
    unit = wide * rstd
    change = rstd * (inner - unit * (tl.sum(inner * unit) / width))
    place = into + row * into_stride + column
    total = tl.load(place, mask=inside, other=0.0).to(tl.float32) + change
    tl.store(place, total.to(into.dtype.element_ty), mask=inside)
