"""Token cross-entropy, summed: the `loss_sum` of the formula.

A reference and a chunked form with one signature.

Legend: B rows, T tokens, H hidden size, V vocabulary, S supervised places, C places of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glassloop.data.rows import IGNORE

# (512, 128256) fp32 logits are 0.25 GiB; fewer rows leave the head's matrix product bound by memory
CHUNK_TOKENS = 512


@dataclass(frozen=True)
class TrainedRows:
    """Rows of the head that train, in place of its own.

    places: (K,) int64, rows of the weight. rows: (K, H) fp32, differentiable.
    """

    places: Tensor
    rows: Tensor


def bent(products: Tensor, scale: float, cap: float | None) -> tuple[Tensor, Tensor | float]:
    """Logits of the head's products, and their slope.

    Logits are scale * product, or cap * tanh(scale * product / cap) with a cap.
    """
    if cap is None:
        return products if scale == 1 else products * scale, scale
    share = torch.tanh(products * (scale / cap))
    return cap * share, scale * (1 - share**2)


def token_loss_sums_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, row_of: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats summed over supervised places, by plain torch.

    All logits at once, in fp32.

    Args:
        hidden: (B, T, H), the decoder's output after its last norm.
        weight: (V, H), the head. bias: (V,) or None.
        targets: (B, T) int64, already shifted; IGNORE where a place carries no loss.
        row_of: (B, T) int64, index of the row that a place belongs to. rows: how many there are.

    Returns:
        loss_sum () fp32, differentiable in hidden; row_loss_sums (rows,) fp32, detached. 0 where
        nothing is supervised.
    """
    logits = F.linear(hidden, weight, bias).float()  # (B, T, V)
    losses = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )  # (B*T,)
    return losses.sum(), sums_by_row(losses.detach(), row_of.flatten(), rows)


def token_loss_sums(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_of: Tensor,
    rows: int,
    *,
    places: Tensor | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    scale: float = 1.0,
    cap: float | None = None,
    trained: TrainedRows | None = None,
) -> tuple[Tensor, Tensor]:
    """The sums of `token_loss_sums_reference`, in chunks of supervised places.

    The head is frozen but for `trained`: no other gradient of it is computed. Gradients are
    computed beside the loss, since the logits are at hand then.
    Matrix products run in the weight's dtype, the softmax in fp32.

    Args:
        places: (S,) int64, flat indices of the supervised places, where the caller knows them;
            None: found here, at the price of one wait for the device.
        scale, cap: between the head's product and the logits (see `bent`).
    """
    if places is None:
        places = (targets.flatten() != IGNORE).nonzero().squeeze(1)  # (S,)
    chosen = hidden.flatten(0, 1).index_select(0, places)  # (S, H)
    labels = targets.flatten().index_select(0, places)  # (S,)
    at = rows_of_head = None
    if trained is not None:
        at, rows_of_head = trained.places, trained.rows
        weight = weight.detach().index_copy(0, at, rows_of_head.detach().to(weight.dtype))
    losses = _ChunkedCrossEntropy.apply(
        chosen, weight, bias, labels, chunk_tokens, scale, cap, at, rows_of_head
    )  # (S,) fp32
    owner = row_of.flatten().index_select(0, places)
    return losses.sum(), sums_by_row(losses.detach(), owner, rows)


def sums_by_row(losses: Tensor, owner: Tensor, rows: int) -> Tensor:
    """Each row's sum of its places' losses, (rows,) fp32.

    Args:
        losses: (S,) fp32. owner: (S,) int64, each place's row.

    A GPU adds in whatever order its threads come. In fp64 that order is lost in the rounding to
    fp32, so a row's sum has, all but always, the same bits.
    """
    return (
        torch.zeros(rows, dtype=torch.float64, device=losses.device)
        .index_add_(0, owner, losses.double())
        .float()
    )


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    wants_grad: bool,
    chunk_tokens: int = CHUNK_TOKENS,
    scale: float = 1.0,
    cap: float | None = None,
    at: Tensor | None = None,
    grad_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of each place, (S,) fp32.

    With it, if wanted, the gradient of its sum in hidden, (S, H).

    Args:
        labels: (S,) int64.
        at: (K,) int64, rows of the weight whose gradient is added to `grad_rows` (K, H) fp32.
    """
    losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)  # (S,)
    grad_hidden = torch.empty_like(hidden) if wants_grad else None  # (S, H)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(labels), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            label = labels[chunk].unsqueeze(1)  # (C, 1)
            logits = F.linear(hidden[chunk].to(weight.dtype), weight, bias).float()  # (C, V)
            logits, slope = bent(logits, scale, cap)
            label_logit = logits.gather(1, label)  # (C, 1)
            peak = logits.amax(1, keepdim=True)
            scaled = logits.sub_(peak).exp_()  # in place: the logits are not needed again
            total = scaled.sum(1, keepdim=True)
            losses[chunk] = (total.log() + peak - label_logit).squeeze(1)
            if grad_hidden is not None:
                gradient = scaled.div_(total)  # softmax - onehot
                gradient.scatter_add_(1, label, torch.full_like(label_logit, -1.0))
                if cap is not None or scale != 1:
                    gradient.mul_(slope)
                grad_hidden[chunk] = (gradient.to(weight.dtype) @ weight).to(hidden.dtype)
                if at is not None and grad_rows is not None:
                    grad_rows.addmm_(gradient.index_select(1, at).mT, hidden[chunk].float())
                del gradient
            del logits, scaled, slope  # or they would live on while the next chunk's are made
    return losses, grad_hidden


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Per-place cross-entropy.

    Only the gradient of a sum is supported: every place has the same incoming gradient.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk_tokens: int,
        scale: float,
        cap: float | None,
        at: Tensor | None,
        rows: Tensor | None,
    ) -> Tensor:  # type: ignore[override]
        wants_grad = ctx.needs_input_grad[0]
        grad_rows = None if rows is None else torch.zeros_like(rows, dtype=torch.float32)
        losses, grad_hidden = chunked_cross_entropy(
            hidden,
            weight,
            bias,
            labels,
            wants_grad=wants_grad,
            chunk_tokens=chunk_tokens,
            scale=scale,
            cap=cap,
            at=at,
            grad_rows=grad_rows,
        )
        ctx.save_for_backward(grad_hidden, grad_rows)
        return losses

    @staticmethod
    def backward(ctx, grad_losses: Tensor):  # type: ignore[override]
        grad_hidden, grad_rows = ctx.saved_tensors
        inward = grad_hidden * grad_losses.unsqueeze(1).to(grad_hidden.dtype)
        # one incoming gradient for all places, so that a sum over them may be scaled
        own = None if grad_rows is None else grad_rows * grad_losses[:1].sum()
        return inward, *[None] * 7, own
