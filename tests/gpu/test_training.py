"""Updates on one CUDA device: fp16's loss scale, dtypes, layouts, optimizers, determinism."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def update(run, u: int):
    from train_loop import update_once

    outcome = update_once(run, u)
    assert outcome is not None
    return outcome


def test_an_fp16_overflow_is_skipped_recorded_and_halves_the_scale(run_of):
    run = run_of(execution={"precision": "fp16"}, stability={"initial_loss_scale": 2.0**40})
    before = run.replica.adapters.flat.detach().clone()
    first = update(run, 1)
    assert (first.record.action, first.record.loss_scale, first.decision.nonfinite) == (
        "skipped",
        2.0**40,
        False,
    )
    assert "fp16 overflow" in first.record.reason
    assert first.record.lr == run.plan.lr[0]
    assert torch.equal(before, run.replica.adapters.flat)
    assert not run.replica.optimizer.state[run.replica.adapters.flat]  # its own count has not moved
    records = [update(run, u).record for u in range(2, 60)]
    skipped = [record for record in records if record.action == "skipped"]
    assert [record.loss_scale for record in skipped] == [
        2.0 ** (39 - i) for i in range(len(skipped))
    ]
    assert records[-1].action == "applied"
    assert records[-1].loss_nats < first.record.loss_nats


def test_fp16_and_bf16_give_the_gradient_of_fp32_within_their_rounding(run_of):
    grads = {}
    for precision in ("fp32", "bf16", "fp16"):
        run = run_of(
            execution={"precision": precision},
            optimizer={"max_grad_norm": None},
            stability={"initial_loss_scale": 1024.0},
        )
        assert update(run, 1).record.action == "applied"
        grads[precision] = run.replica.adapters.grad.double()
    for precision, bound in (("bf16", 0.05), ("fp16", 0.01)):
        assert (grads[precision] - grads["fp32"]).norm() / grads["fp32"].norm() < bound


def test_adapters_gradients_and_loss_are_fp32_and_the_base_is_not(run_of):
    run = run_of()
    trainable = {p.dtype for p in run.replica.plain_engine.parameters() if p.requires_grad}
    frozen = {p.dtype for p in run.replica.plain_engine.parameters() if not p.requires_grad}
    assert trainable == {run.replica.adapters.grad.dtype} == {torch.float32}
    assert frozen == {torch.bfloat16, torch.uint8}
    assert {p.device for p in run.replica.plain_engine.parameters()} == {torch.device("cuda:0")}


@pytest.mark.parametrize("execution", [{"layout": "packed"}, {"checkpointing": True}])
def test_layouts_and_recomputation_leave_the_fp32_gradient_as_it_is(run_of, execution):
    grads = []
    for how in ({"checkpointing": False}, execution):
        run = run_of(execution={"precision": "fp32", **how}, optimizer={"max_grad_norm": None})
        update(run, 1)
        grads.append(run.replica.adapters.grad.double())
    assert (grads[0] - grads[1]).norm() / grads[0].norm() <= 1e-6


def test_60_updates_with_8_bit_states_end_near_those_with_32_bit_states(run_of):
    losses = {}
    for name in ("adamw", "adamw_8bit", "paged_adamw_8bit"):
        run = run_of(optimizer={"name": name})
        losses[name] = [update(run, u).record.loss_nats for u in range(1, 61)]
        learned = losses[name][0] - losses[name][-1]
        assert learned > 1
    for name in ("adamw_8bit", "paged_adamw_8bit"):
        gap = abs(sum(losses[name][-5:]) - sum(losses["adamw"][-5:])) / 5
        assert gap < 0.05 * learned, (name, gap, learned)


def test_the_same_run_twice_is_the_same_to_the_last_bit_in_deterministic_mode(run_of):
    ends = []
    for _ in range(2):
        run = run_of(execution={"deterministic": True})
        for u in range(1, 6):
            update(run, u)
        ends.append(run.replica.adapters.flat.detach().clone())
    torch.use_deterministic_algorithms(False)
    assert torch.equal(*ends)


def test_norms_stay_in_bf16_under_autocast_on_cuda():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from glassloop.engines.norms import fuse_norms

    norm = LlamaRMSNorm(64).to("cuda", torch.bfloat16)
    assert fuse_norms(norm) == 1
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert norm(torch.randn(3, 64, device="cuda", dtype=torch.bfloat16)).dtype == torch.bfloat16
