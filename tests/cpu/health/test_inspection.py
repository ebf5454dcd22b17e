"""What is read of an update on one rank: the noise scale from halves of a window, and its place in
checkpoints."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from glassloop.health.noise import estimates
from glassloop.health.signals import Finding
from glassloop.loop.commands import replay_of


def parts_of(run, u: int) -> tuple[list[float], list[int], float]:
    """|s_p| and n_p of the halves of update u's passes, and |g|, each from backward passes of its
    own."""
    from glassloop.data.batches import build_pass

    window = run.batches.window(u)
    n = run.batches.supervised_tokens(window)
    (passes,) = window.passes
    grads, tokens = [], []
    for half in (passes[: len(passes) // 2], passes[len(passes) // 2 :]):
        run.replica.adapters.zero_grad()
        for rows in half:
            p = build_pass(
                [run.batches.rows[row] for row in rows],
                packed=window.packed,
                pad_id=run.replica.pad_id,
                device=run.replica.device,
            )
            (run.replica.engine(p)[0] / n).backward()
        grads.append(run.replica.adapters.grad.double().clone())
        tokens.append(sum(run.batches.rows[row].supervised_tokens for rows in half for row in rows))
    return [grad.norm().item() for grad in grads], tokens, sum(grads).norm().item()


@pytest.mark.parametrize("layout", ["literal", "packed"])
def test_a_lone_rank_takes_the_noise_scale_from_the_halves_of_a_probed_window(run_of, layout):
    from train_loop import update_once

    execution = {"layout": layout, "precision": "fp32", "checkpointing": False}
    run = run_of(
        execution=execution | ({"pass_tokens": 4096} if layout == "packed" else {}),
        record={"probe_every_updates": 2},
    )
    first = update_once(run, 1)
    assert first.record.noise_scale_tokens is None
    assert first.probe is None
    parts = parts_of(run, 2)
    second = update_once(run, 2)
    assert second.record.rank_passes == ((2,) if layout == "packed" else (4,))
    assert first.record.rank_passes == ((1,) if layout == "packed" else (4,))
    within, squared = estimates(*parts)
    expected = within / squared if within > 0 and squared > 0 else None
    assert second.record.noise_scale_tokens == (
        None if expected is None else pytest.approx(expected, rel=1e-3)
    )
    noise = run.inspection.noise
    assert (noise.updates, noise.within) == (1, pytest.approx((1 - noise.decay) * within, rel=1e-3))
    assert second.probe is not None


def test_detectors_and_noise_scale_go_on_where_they_were(run_of):
    from train_loop import update_once

    run = run_of(
        execution={"precision": "fp32", "checkpointing": False}, record={"probe_every_updates": 1}
    )
    for u in range(1, 9):
        update_once(run, u)
    state = run.inspection.state()
    other = run_of(execution={"precision": "fp32", "checkpointing": False}).inspection
    assert other.state() != state
    other.restore(state)
    assert other.state() == state


def test_no_update_of_a_run_that_is_diverging_is_kept_as_a_healthy_one(run_of):
    inspection = run_of(execution={"precision": "fp32", "checkpointing": False}).inspection
    gate, decision = SimpleNamespace(capture=False), SimpleNamespace(bad=None, reason=None)
    assert inspection.capsule_reason(inspection.healthy_at, gate, decision) == "healthy"
    inspection.detectors.above_in_a_row = 1
    assert inspection.capsule_reason(inspection.healthy_at, gate, decision) is None


def test_a_run_that_diverged_is_looked_at_before_it_did_others_where_they_were_told():
    spike, diverged = (
        Finding("norm_spike", "", {"value": 9.0}),
        Finding("diverged", "", {"since": 4}),
    )
    assert replay_of(spike, Path("run"), 8) == "glassloop replay run --update 8 --bisect"
    assert replay_of(diverged, Path("run"), 8) == "glassloop replay run --update 3 --bisect --try"


def test_an_update_that_is_put_back_leaves_no_trace_in_the_windows(run_of):
    from train_loop import update_once

    run = run_of(execution={"precision": "fp32", "checkpointing": False})
    update_once(run, 1)
    run.remember(2)
    before, rng = run.inspection.state(), torch.get_rng_state()
    update_once(run, 2)
    torch.rand(1)
    assert run.inspection.state() != before
    run.put_back()
    assert run.inspection.state() == before
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_run_that_is_not_what_was_planned_ends_with_an_event_and_saves_nothing(run_of):
    from glassloop.plan.contract import ContractBroken
    from glassloop.record.jsonl import read_jsonl

    run = run_of(execution={"precision": "fp32", "checkpointing": False})
    run.remember(7)
    assert run.broken(ContractBroken("update 7: planned 8 rows, counted 7")) == 1
    event = read_jsonl(run.folder / "events.jsonl")[-1]
    assert (event["update"], event["kind"], event["message"]) == (
        7,
        "failed",
        "update 7: planned 8 rows, counted 7",
    )
    assert not (run.folder / "checkpoints").exists()
