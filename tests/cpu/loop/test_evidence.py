"""A lack of GPU memory leaves a table and a snapshot before the run reacts.

The card is a stand-in.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import train_loop
from glassloop.loop.evidence import account_of, in_words
from glassloop.loop.witness import FOLDER, Seen, Witness
from glassloop.predict.terms import GIB, Ledger, Term
from glassloop.record.reading import read_run

CUDA = SimpleNamespace(type="cuda")


class FakeCuda:
    """A card of 24 GiB, full at the moment that is asked for."""

    def __init__(self) -> None:
        self.memory = SimpleNamespace(
            _snapshot=lambda: {"segments": [{"total_size": 7}], "device_traces": [[]]},
            _record_memory_history=lambda *words, **more: self.asked.append((words, more)),
        )
        self.asked: list[Any] = []

    def mem_get_info(self, _device: Any) -> tuple[int, int]:
        return GIB // 2, 24 * GIB

    def memory_allocated(self, _device: Any) -> int:
        return 20 * GIB

    def memory_reserved(self, _device: Any) -> int:
        return 22 * GIB


def witness(folder: Path) -> Witness:
    return Witness(folder, 1, CUDA, FakeCuda())  # type: ignore[arg-type]


def test_the_observer_keeps_what_filled_the_card_and_a_snapshot(tmp_path: Path) -> None:
    found = witness(tmp_path)
    found.observe(0, 3 * GIB, 0, 0)
    seen = found.take()
    assert seen == Seen(3 * GIB, 20 * GIB, 22 * GIB, GIB // 2, 24 * GIB, snapshot="rank1.pickle")
    assert seen is not None and seen.others == round(1.5 * GIB)
    assert found.take() is None
    written = pickle.loads((tmp_path / FOLDER / "rank1.pickle").read_bytes())
    assert written["segments"] == [{"total_size": 7}]


def test_a_disk_that_refuses_does_not_hide_the_lack_of_memory(tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("in the way")
    found = witness(tmp_path)
    found.observe(0, GIB, 0, 0)
    seen = found.take()
    assert seen is not None and seen.snapshot is None


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("no snapshot")])
def test_a_host_without_memory_costs_the_snapshot_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    found = witness(tmp_path)

    def fails() -> None:
        raise error

    monkeypatch.setattr(found.cuda.memory, "_snapshot", fails)
    found.observe(0, GIB, 0, 0)
    seen = found.take()
    assert seen is not None and seen.snapshot is None and seen.asked == GIB


def test_an_error_of_the_observer_does_not_take_the_place_of_the_lack_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = witness(tmp_path)

    def fails(_device: Any) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(found.cuda, "mem_get_info", fails)
    found.observe(0, GIB, 0, 0)
    assert found.take() is None


def test_a_run_that_has_ended_sees_nothing_of_the_next_one(tmp_path: Path) -> None:
    """torch keeps both observers: the first would write into a folder that is done."""
    found = witness(tmp_path)
    found.detach()
    found.detach()
    cuda: Any = found.cuda
    assert cuda.asked == [((), {"enabled": None})]
    found.observe(0, GIB, 0, 0)
    assert found.take() is None and not (tmp_path / FOLDER).exists()


def test_a_run_on_a_cpu_has_nothing_to_end(tmp_path: Path) -> None:
    found = Witness(tmp_path, 0, torch.device("cpu"), None)
    found.detach()
    assert not found.over


def test_torch_records_allocations_without_stacks_and_calls_the_observer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attached: list[Any] = []
    monkeypatch.setattr(
        torch._C, "_cuda_attach_out_of_memory_observer", attached.append, raising=False
    )
    found = witness(tmp_path)
    found.attach()
    assert attached == [found.observe]
    cuda: Any = found.cuda
    ((words, more),) = cuda.asked
    assert words == ("all",) and more["context"] is None
    Witness(tmp_path, 0, torch.device("cpu")).attach()  # nothing on a CPU
    assert len(attached) == 1


def test_the_table_adds_up_to_the_card_and_stands_beside_the_ledger_s_peak(
    tmp_path: Path,
) -> None:
    seen = Seen(GIB, 20 * GIB, 22 * GIB, GIB // 2, 24 * GIB, None)
    ledger = Ledger(
        "peft",
        (
            Term("linear weights", 5 * GIB, ("load", "backward")),
            Term("logits of a chunk", GIB, ("logits",)),
            Term("buffers", 9 * GIB, ("backward",)),
        ),
    )
    found = account_of(seen, update=7, rank=1, resident={"base": 6 * GIB}, ledger=ledger)
    assert sum(found["held_gib"].values()) == pytest.approx(24, abs=1e-3)
    assert found["held_gib"]["activations and workspaces of the pass"] == 14
    assert (found["predicted_phase"], found["predicted_peak_gib"]) == ("backward", 14)
    assert found["predicted_gib"] == {"linear weights": 5.0, "buffers": 9.0}
    assert in_words(found) == (
        "rank 1 asked for 1.00 GiB of a card of 24.00 GiB that held, in GiB: base 6.00, "
        "activations and workspaces of the pass 14.00, reserved by torch, not in use 2.00, CUDA "
        "itself and other processes 1.50, free 0.50; the ledger predicted 14.00 GiB of tensors"
    )
    unknown = account_of(seen, update=7, rank=1, resident={}, ledger=None)
    assert unknown["predicted_peak_gib"] is None and "ledger" not in in_words(unknown)


def test_the_evidence_comes_before_the_reaction(
    run_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's device claims to be a GPU while the evidence is taken; everything else is real."""
    run = run_of(schedule={"updates": 3, "warmup_updates": 1}, execution={"preflight": False})
    run.witness = Witness(run.folder, 0, CUDA, FakeCuda())  # type: ignore[arg-type]
    genuine_passes, genuine_leave = train_loop.run_passes, train_loop.leave_evidence
    failed: list[int] = []

    def run_passes(replica: Any, rows: Any, window: Any, *more: Any) -> Any:
        sums = genuine_passes(replica, rows, window, *more)
        if window.update == 2 and not failed:
            failed.append(2)
            run.witness.observe(0, GIB, 0, 0)
            return train_loop.replace(sums, whole=False, out_of_memory=True)  # type: ignore[attr-defined]
        return sums

    def leave(*given: Any) -> None:
        with monkeypatch.context() as here:
            here.setattr(run.replica, "device", CUDA)
            here.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
            genuine_leave(*given)

    monkeypatch.setattr(train_loop, "run_passes", run_passes)
    monkeypatch.setattr(train_loop, "leave_evidence", leave)
    monkeypatch.setattr(run.witness, "attach", lambda: None)
    assert train_loop.train(run) == 0
    run.close_observers()
    kinds = [event["kind"] for event in read_run(run.folder).events]
    assert kinds.index("memory_account") < kinds.index("out_of_memory")
    table = json.loads((run.folder / FOLDER / "rank0.json").read_text())
    assert (table["update"], table["rank"], table["snapshot"]) == (2, 0, "rank0.pickle")
    assert table["held_gib"]["adapters and gradients"] >= 0
    (event,) = [one for one in read_run(run.folder).events if one["kind"] == "memory_account"]
    assert event["details"]["account"]["held_gib"] == table["held_gib"]


def test_a_rank_that_was_not_short_says_nothing(
    run_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(schedule={"updates": 3, "warmup_updates": 1})
    run.witness = Witness(run.folder, 0, CUDA, FakeCuda())  # type: ignore[arg-type]
    run.witness.observe(0, GIB, 0, 0)  # a lack that was cured on the way, such as a trial's
    with monkeypatch.context() as here:
        here.setattr(run.replica, "device", CUDA)
        train_loop.leave_evidence(run, run.batches.window(1), (1,))
    run.close_observers()
    assert not (run.folder / FOLDER / "rank0.json").exists()


def test_a_run_that_closes_lets_its_witness_go(run_of, tmp_path: Path) -> None:
    run = run_of()
    run.witness = witness(tmp_path)
    run.close()
    assert run.witness.over
