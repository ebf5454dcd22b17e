"""Mapped rows make the same run as rows in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train_loop
from glassloop.data import making, reading
from glassloop.data.stored import StoredRows
from glassloop.loop.run import Run

TIMES = ("seconds", "_s", "_ms", "per_s", "gib", "time")


def lines(run: Run, name: str) -> list[dict[str, Any]]:
    """Lines of a record without what a clock or the allocator says."""
    found = []
    for line in (run.folder / name).read_text().splitlines():
        raw = json.loads(line)
        found.append({key: raw[key] for key in raw if not key.endswith(TIMES)})
    return found


def trained(run_of: Callable[..., Run]) -> tuple[Run, torch.Tensor]:
    run = run_of(
        schedule={"updates": 3, "warmup_updates": 1},
        data={"heldout": 0.2},
        evaluation={"samples": 2, "every_updates": 2, "max_new_tokens": 8},
        record={"text": "full"},
        execution={"precision": "fp32"},
    )
    train_loop.train(run)
    return run, run.replica.adapters.flat.detach().clone()


def test_a_run_is_the_same_bit_for_bit_with_rows_kept_in_files(
    run_of: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain, adapters = trained(run_of)
    assert not isinstance(plain.batches.rows, StoredRows)
    monkeypatch.setattr(reading, "FEW_BYTES", 0)
    monkeypatch.setattr(reading, "ordered", making.make)
    monkeypatch.setattr(making, "CHUNK", 10**6)
    stored, others = trained(run_of)
    assert isinstance(stored.batches.rows, StoredRows)
    assert torch.equal(adapters, others)
    assert json.loads((plain.folder / "plan.json").read_text()) == json.loads(
        (stored.folder / "plan.json").read_text()
    )
    for name in ("metrics.jsonl", "rows.jsonl", "evaluations.jsonl", "samples.jsonl"):
        assert lines(plain, name) == lines(stored, name) != []
