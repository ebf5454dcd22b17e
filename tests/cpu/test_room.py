"""What a run says of memory: predicted beside measured, and settings that would fit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from glassloop import room


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    """As if the run's device were a GPU whose allocator has held 3 GiB."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * room.GIB)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return SimpleNamespace(type="cuda")


@pytest.mark.parametrize("layout", ["literal", "packed"])
def test_predicted_memory_stands_beside_measured(run_of, on_a_gpu, layout):
    run = run_of(execution={"precision": "fp32", "checkpointing": False, "layout": layout})
    window = run.batches.heaviest()
    assert room.memory_lines(run, window) == []  # on a CPU nothing is measured
    run.device = on_a_gpu
    run.measured_gib = {"load": 1.0, "adapters": 1.25}
    (line,) = room.memory_lines(run, window)
    ledger = room.ledger_of_pass(run, run.batches.share(window, 0))
    assert ledger is not None
    expected = {phase: size / room.GIB for phase, size in ledger.phases.items()}
    assert line == (
        f"predicted / measured GiB: load {expected['load']:.2f} / 1.00, adapters {expected['adapters']:.2f} / 1.25, "
        f"peak {expected['peak']:.2f} / 3.00"
    )


def test_what_the_ledger_does_not_know_is_measured_all_the_same(run_of, on_a_gpu, monkeypatch):
    run = run_of(execution={"precision": "fp32", "checkpointing": False})
    run.device = on_a_gpu

    def unknown(*_):
        raise ValueError("lora.targets = c_attn: not in these shapes")

    monkeypatch.setattr(room, "ledger_of", unknown)
    (line,) = room.memory_lines(run, run.batches.heaviest())
    assert line == "predicted / measured GiB: load unknown / 0.00, adapters unknown / 0.00, peak unknown / 3.00"


def test_a_heavier_pass_is_predicted_to_take_more(run_of, on_a_gpu):
    run = run_of(execution={"precision": "fp32", "checkpointing": False})
    run.device = on_a_gpu
    rows = sorted(run.batches.rows, key=len)
    light, heavy = (room.ledger_of_pass(run, chosen) for chosen in (rows[:1], rows[-2:]))
    assert light is not None
    assert heavy is not None
    assert heavy.peak_bytes > light.peak_bytes
    assert room.ledger_of_pass(run, []) is None


def test_what_would_fit_leaves_the_rows_of_an_update_alone(run_of):
    text = room.cures(run_of(execution={"precision": "fp32", "checkpointing": False}))
    assert "execution.checkpointing=true" in text
    assert "batch.size=1 batch.rows_per_update=8" in text
    packed = room.cures(run_of(execution={"precision": "fp32", "checkpointing": True, "layout": "packed"}))
    assert "a smaller execution.pass_tokens" in packed
    assert "checkpointing" not in packed
