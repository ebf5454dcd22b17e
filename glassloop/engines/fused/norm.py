"""RMS norms over H, with residual additions, and over heads.

Zhang and Sennrich 2019, arXiv:1910.07467. The residual is added before the norm, and in its
gradient. Everything is computed in fp32 and rounded once.

Legend: T tokens, H hidden size, D head size.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# (a launch has options, num_warps say, that are no parameters of the kernel)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from glassloop.engines.fused.launch import by_kernels, launch


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
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, into: Tensor, *, add: bool = True
) -> None:
    """Add the norm's gradient in x to `into`, or write it there.

    The norm is weight * x / rms(x). `into`: (T, H), any row stride; without `add` it may be grad.
    grad: (T, H) of the norm's output.
    """
    change = _slope(grad, x, weight, eps)
    into.copy_(into.float() + change if add else change)


def _slope(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gradient in x of weight * x / rms(x), fp32.

    Over the last dimension.
    """
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)  # (T, 1)
    unit, inner = wide * rstd, grad.float() * weight.float()
    return rstd * (inner - unit * (inner * unit).mean(-1, keepdim=True))


def add_norm(x: Tensor, y: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """As `add_norm_reference`; on a GPU in one launch."""
    return (add_norm_triton if by_kernels(x) else add_norm_reference)(x, y, weight, eps, out)


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, into: Tensor, *, add: bool = True
) -> None:
    """As `norm_backward_reference`; on a GPU in one launch."""
    one = norm_backward_triton if by_kernels(x) else norm_backward_reference
    one(grad, x, weight, eps, into, add=add)


def norm_heads_reference(
    x: Tensor, weights: tuple[Tensor, Tensor], keys: int, eps: float, out: Tensor
) -> None:
    """Write each head of x over its rms, times its weight.

    x, out: (T, heads * D), any row stride. weights: (D,) of queries, and of the last `keys` heads.
    """
    size = len(weights[0])
    wide = x.float().unflatten(1, (-1, size))  # (T, heads, D)
    unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    out.copy_((unit * _by_head(weights, keys, wide.shape[1])).flatten(1))


def norm_heads_backward_reference(
    grad: Tensor, x: Tensor, weights: tuple[Tensor, Tensor], keys: int, eps: float
) -> None:
    """Turn the gradient of `norm_heads`'s output into that of x.

    In place, (T, heads * D).
    """
    size = len(weights[0])
    heads = [t.unflatten(1, (-1, size)) for t in (grad, x)]
    weight = _by_head(weights, keys, heads[1].shape[1])
    grad.copy_(_slope(*heads, weight, eps).flatten(1))


def _by_head(weights: tuple[Tensor, Tensor], keys: int, heads: int) -> Tensor:
    """(heads, D) fp32: the weight of queries, then of keys."""
    q, k = (one.float() for one in weights)
    return torch.cat([q.expand(heads - keys, -1), k.expand(keys, -1)])


def norm_heads(
    x: Tensor, weights: tuple[Tensor, Tensor], keys: int, eps: float, out: Tensor
) -> None:
    """As `norm_heads_reference`; on a GPU in one launch."""
    (norm_heads_triton if by_kernels(x) else norm_heads_reference)(x, weights, keys, eps, out)


def norm_heads_backward(
    grad: Tensor, x: Tensor, weights: tuple[Tensor, Tensor], keys: int, eps: float
) -> None:
    """As `norm_heads_backward_reference`; on a GPU in one launch."""
    one = norm_heads_backward_triton if by_kernels(x) else norm_heads_backward_reference
    one(grad, x, weights, keys, eps)


def add_norm_triton(x: Tensor, y: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    rows, width = x.shape
    s = x if y is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        _add_norm, (rows,),
        x, s if y is None else y, weight, s, out,
        x.stride(0), 0 if y is None else y.stride(0), out.stride(0), width, eps,
        ADD=y is not None, BLOCK=triton.next_power_of_2(width), num_warps=_warps(width),
    )  # fmt: skip
    return s


def norm_backward_triton(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, into: Tensor, *, add: bool = True
) -> None:
    rows, width = x.shape
    launch(
        _norm_backward, (rows,),
        grad, x, weight, into, grad.stride(0), x.stride(0), into.stride(0), width, eps,
        ADD=add, BLOCK=triton.next_power_of_2(width), num_warps=_warps(width),
    )  # fmt: skip


HEADS_OF_A_PROGRAM = 8


def norm_heads_triton(
    x: Tensor, weights: tuple[Tensor, Tensor], keys: int, eps: float, out: Tensor
) -> None:
    size = len(weights[0])
    heads = x.shape[1] // size
    launch(
        _norm_heads, (len(x), triton.cdiv(heads, HEADS_OF_A_PROGRAM)),
        x, *weights, out, x.stride(0), out.stride(0), heads, heads - keys, size, eps,
        HEADS=HEADS_OF_A_PROGRAM, SIZE=triton.next_power_of_2(size), num_warps=4,
    )  # fmt: skip


def norm_heads_backward_triton(
    grad: Tensor, x: Tensor, weights: tuple[Tensor, Tensor], keys: int, eps: float
) -> None:
    size = len(weights[0])
    heads = x.shape[1] // size
    launch(
        _norm_heads_backward, (len(x), triton.cdiv(heads, HEADS_OF_A_PROGRAM)),
        grad, x, *weights, grad.stride(0), x.stride(0), heads, heads - keys, size, eps,
        HEADS=HEADS_OF_A_PROGRAM, SIZE=triton.next_power_of_2(size), num_warps=4,
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
    grad, x, weight, into, grad_stride, x_stride, into_stride, width, eps,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
    if ADD:
        change += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, change.to(into.dtype.element_ty), mask=inside)


@triton.jit
def _heads(
    x, q_weight, k_weight, stride, heads, queries, size, HEADS: tl.constexpr, SIZE: tl.constexpr
):
    """Offsets, mask, values and weights of a program's heads, (HEADS, SIZE)."""
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, SIZE)[None, :]
    at, inside = head * size + column, (head < heads) & (column < size)
    value = tl.load(x + tl.program_id(0).to(tl.int64) * stride + at, mask=inside, other=0.0)
    q = tl.load(q_weight + column, mask=column < size, other=0.0).to(tl.float32)
    k = tl.load(k_weight + column, mask=column < size, other=0.0).to(tl.float32)
    return at, inside, value.to(tl.float32), tl.where(head < queries, q, k)


@triton.jit
def _norm_heads(
    x, q_weight, k_weight, out, x_stride, out_stride, heads, queries, size, eps,
    HEADS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    at, inside, value, weight = _heads(
        x, q_weight, k_weight, x_stride, heads, queries, size, HEADS, SIZE
    )
    rstd = 1.0 / tl.sqrt(tl.sum(value * value, 1) / size + eps)
    to = out + tl.program_id(0).to(tl.int64) * out_stride + at
    tl.store(to, (value * rstd[:, None] * weight).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_heads_backward(
    grad, x, q_weight, k_weight, grad_stride, x_stride, heads, queries, size, eps,
    HEADS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    at, inside, value, weight = _heads(
        x, q_weight, k_weight, x_stride, heads, queries, size, HEADS, SIZE
    )
    place = grad + tl.program_id(0).to(tl.int64) * grad_stride + at
    inner = tl.load(place, mask=inside, other=0.0).to(tl.float32) * weight
    rstd = (1.0 / tl.sqrt(tl.sum(value * value, 1) / size + eps))[:, None]
    unit = value * rstd
    change = rstd * (inner - unit * (tl.sum(inner * unit, 1) / size)[:, None])
    tl.store(place, change.to(grad.dtype.element_ty), mask=inside)
