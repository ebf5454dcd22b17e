"""The chunked loss against plain torch, and both against float64."""

import pytest
import torch
import torch.nn.functional as F

from glassloop.data.rows import IGNORE
from glassloop.formula.loss import sums_by_row, token_loss_sums, token_loss_sums_reference


def case(seed: int, dtype=torch.float32, bias: bool = False):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, 17, 8, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(50, 8, generator=g).to(dtype) * 3
    head_bias = torch.randn(50, generator=g).to(dtype) if bias else None
    targets = torch.randint(0, 50, (2, 17), generator=g)
    targets[0, :9] = IGNORE
    targets[:, -1] = IGNORE
    row_of = torch.tensor([[0] * 17, [1] * 5 + [2] * 12])
    return hidden, weight, head_bias, targets, row_of


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 512])
@pytest.mark.parametrize("loss", [token_loss_sums, token_loss_sums_reference])
def test_sums_and_gradient_equal_float64(loss, chunk_tokens, bias):
    hidden, weight, head_bias, targets, row_of = case(0, bias=bias)
    extra = {"chunk_tokens": chunk_tokens} if loss is token_loss_sums else {}
    loss_sum, row_sums = loss(hidden, weight, head_bias, targets, row_of, 3, **extra)
    (loss_sum * 0.37).backward()
    exact = hidden.detach().double().requires_grad_()
    logits = F.linear(exact, weight.double(), None if head_bias is None else head_bias.double())
    each = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
    ).view(2, 17)
    (each.sum() * 0.37).backward()
    assert loss_sum.dtype == torch.float32
    torch.testing.assert_close(loss_sum.double(), each.sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        row_sums.double(),
        torch.stack([each[row_of == r].sum() for r in range(3)]),
        rtol=1e-6,
        atol=0,
    )
    error = (hidden.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 1e-6


def test_places_known_beforehand_change_nothing():
    hidden, weight, _, targets, row_of = case(1)
    places = (targets.flatten() != IGNORE).nonzero().squeeze(1)
    found, known = (
        token_loss_sums(hidden, weight, None, targets, row_of, 3, places=p) for p in (None, places)
    )
    assert torch.equal(found[0], known[0]) and torch.equal(found[1], known[1])


def test_nothing_supervised_gives_zero_and_a_zero_gradient():
    hidden, weight, _, targets, row_of = case(2)
    loss_sum, row_sums = token_loss_sums(
        hidden, weight, None, torch.full_like(targets, IGNORE), row_of, 3
    )
    loss_sum.backward()
    assert loss_sum.item() == 0 and row_sums.tolist() == [0, 0, 0]
    assert hidden.grad is not None and not hidden.grad.any()


def test_large_logits_do_not_overflow():
    hidden, weight, _, targets, row_of = case(3)
    loss_sum, _ = token_loss_sums(hidden * 1e3, weight, None, targets, row_of, 3)
    loss_sum.backward()
    assert loss_sum.isfinite() and hidden.grad.isfinite().all()


def test_a_nan_stays_with_its_row():
    hidden, weight, _, targets, row_of = case(4)
    with torch.no_grad():
        hidden[1, 2] = float("nan")
    loss_sum, row_sums = token_loss_sums(hidden, weight, None, targets, row_of, 3)
    assert loss_sum.isnan() and row_sums.isnan().tolist() == [False, True, False]


def test_bf16_gradient_is_as_close_to_the_truth_as_the_references():
    errors = {}
    for loss in (token_loss_sums, token_loss_sums_reference):
        hidden, weight, _, targets, row_of = case(5, torch.bfloat16)
        loss(hidden, weight, None, targets, row_of, 3)[0].backward()
        exact = hidden.detach().double().requires_grad_()
        logits = exact @ weight.double().T
        F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
        ).backward()
        errors[loss.__name__] = (
            (hidden.grad.double() - exact.grad).norm() / exact.grad.norm()
        ).item()
    assert errors["token_loss_sums"] < 1.1 * errors["token_loss_sums_reference"]


def test_a_rows_sum_has_the_same_bits_in_whatever_order_its_places_are_added():
    g = torch.Generator().manual_seed(5)
    losses, owner = torch.rand(4096, generator=g) * 60, torch.randint(0, 3, (4096,), generator=g)
    sums = sums_by_row(losses, owner, 4)
    assert sums.dtype == torch.float32 and sums[3] == 0
    for _ in range(20):
        order = torch.randperm(4096, generator=g)
        assert torch.equal(sums_by_row(losses[order], owner[order], 4), sums)
