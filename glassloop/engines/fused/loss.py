"""Token cross-entropy of supervised places, and its gradient.

The gradient is in the head's input, some places at a time. The logits of a chunk, rounded as the
head's product leaves them, become softmax - onehot in place: they are read twice and written once.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# (a launch has options, num_warps say, that are no parameters of the kernel)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from glassloop.engines.fused.launch import by_kernels, launch
from glassloop.formula.loss import bent, chunked_cross_entropy
from glassloop.predict.tiers import HEAD_CHUNK

BLOCK = 8192


def cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    losses: Tensor,
    *,
    scale: float = 1.0,
    cap: float | None = None,
) -> None:
    """Write `losses` (C,) fp32, and their gradient over the head's products.

    In place: logits (C, V) come as products, count as formula/loss.py's `bent`, and become the
    gradient of the losses' sum in the products. labels: (C,) int64.
    """
    launch(
        _cross_entropy, (len(logits),),
        logits, labels, losses, logits.stride(0), logits.shape[1], scale, cap or 1.0,
        PLAIN=scale == 1 and cap is None, CAPPED=cap is not None,
        BLOCK=min(BLOCK, triton.next_power_of_2(logits.shape[1])), num_warps=16,
    )  # fmt: skip


def cross_entropy_reference_(
    logits: Tensor,
    labels: Tensor,
    losses: Tensor,
    *,
    scale: float = 1.0,
    cap: float | None = None,
) -> None:
    wide, slope = bent(logits.float(), scale, cap)
    losses.copy_(torch.nn.functional.cross_entropy(wide, labels, reduction="none"))
    minus = -torch.ones_like(losses).unsqueeze(1)
    logits.copy_(wide.softmax(1).scatter_add_(1, labels.unsqueeze(1), minus) * slope)


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    wants_grad: bool,
    scale: float = 1.0,
    cap: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Losses (S,) fp32 of hidden (S, H) under the head (V, H).

    If wanted, also the gradient of their sum in hidden, in its dtype; on a GPU it takes hidden's
    memory. scale, cap: between the
    head's product and the logits, see formula/loss.py's `bent`.
    """
    if not by_kernels(hidden):
        return chunked_cross_entropy(
            hidden, weight, None, labels, wants_grad=wants_grad, scale=scale, cap=cap
        )
    losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
    grad = hidden if wants_grad else None  # a chunk is not read again once its logits are there
    room = hidden.new_empty(min(HEAD_CHUNK, len(labels)), len(weight))
    for start in range(0, len(labels), HEAD_CHUNK):
        chunk = slice(start, min(start + HEAD_CHUNK, len(labels)))
        logits = torch.mm(hidden[chunk], weight.t(), out=room[: chunk.stop - chunk.start])  # (C, V)
        cross_entropy_(logits, labels[chunk], losses[chunk], scale=scale, cap=cap)
        if grad is not None:
            torch.mm(logits, weight, out=grad[chunk])
    return losses, grad


@triton.jit
def _bent(value, scale, cap, PLAIN: tl.constexpr, CAPPED: tl.constexpr):
    """Logits of the head's products."""
    if not PLAIN:
        value = value * scale
        if CAPPED:
            value = cap * (2.0 * tl.sigmoid(2.0 * value / cap) - 1.0)  # tanh
    return value


@triton.jit
def _cross_entropy(
    logits, labels, losses, stride, size, scale, cap,
    PLAIN: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    column = tl.arange(0, BLOCK)
    label = tl.load(labels + row)
    # before anything is overwritten: the sums below keep the threads together
    picked = _bent(tl.load(start + label).to(tl.float32), scale, cap, PLAIN, CAPPED)
    peak = float("-inf")
    total = 0.0
    for block in range(tl.cdiv(size, BLOCK)):
        at = block * BLOCK + column
        value = tl.load(start + at, mask=at < size, other=float("-inf")).to(tl.float32)
        value = _bent(value, scale, cap, PLAIN, CAPPED)
        if CAPPED:  # which makes -inf finite
            value = tl.where(at < size, value, float("-inf"))
        higher = tl.maximum(peak, tl.max(value))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(value - higher))
        peak = higher
    tl.store(losses + row, tl.log(total) + peak - picked)
    for block in range(tl.cdiv(size, BLOCK)):
        at = block * BLOCK + column
        value = tl.load(start + at, mask=at < size, other=float("-inf")).to(tl.float32)
        value = _bent(value, scale, cap, PLAIN, CAPPED)
        slope = tl.exp(value - peak) / total - tl.where(at == label, 1.0, 0.0)
        if not PLAIN:
            slope = slope * scale
            if CAPPED:
                slope = slope * (1.0 - (value / cap) * (value / cap))
        tl.store(start + at, slope.to(logits.dtype.element_ty), mask=at < size)
