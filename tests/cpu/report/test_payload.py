"""The page's data: worst rows, memory, older runs."""

from __future__ import annotations

import base64
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from made_runs import matrices, probe_record, write_run
from plain_records import decoded

from glassloop.record.reading import read_run
from glassloop.report.columns import heat
from glassloop.report.payload import memory, payload, worst_rows
from glassloop.report.writing import write_report


def test_worst_rows_put_what_is_not_finite_first() -> None:
    def row(row_id: str, update: int, loss: float | str, tokens: int = 10) -> dict:
        return dict(
            row_id=row_id,
            update=update,
            loss_sum_nats=loss,
            supervised_tokens=tokens,
            rank=0,
            micro_batch=0,
        )

    worst = worst_rows(
        [
            row("a", 1, 20.0),
            row("b", 1, "nan"),
            row("b", 2, 5.0),
            row("c", 1, 30.0),
            row("c", 2, 90.0),
            row("d", 1, 1.0, 0),
        ]
    )
    assert [(one["id"], one["worst_nats"], one["last_nats"], one["times"]) for one in worst] == [
        ("b", None, 0.5, 2),
        ("c", 9.0, 9.0, 2),
        ("a", 2.0, 2.0, 1),
    ]


def test_memory_is_read_from_what_the_preflight_says() -> None:
    events = [
        dict(
            kind="memory",
            message="memory, predicted / measured GiB: load 5.31 / 5.33, "
            "adapters unknown / 5.50, peak 7.10 / 7.63",
        ),
        dict(
            kind="preflight",
            message="the heaviest pass of each rank (4,096 slot tokens at most) fits "
            "and is finite, peak 7.63 GiB of 79.2",
        ),
    ]
    assert memory(events) == {
        "phases": {"load": [5.31, 5.33], "adapters": [None, 5.5], "peak": [7.1, 7.63]},
        "card": 79.2,
    }
    assert memory([]) is None


def test_the_words_of_the_preflight_are_those_that_are_read(
    run_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from glassloop.loop import memory as room

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * room.GIB)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    run = run_of(execution={"precision": "fp32", "checkpointing": False})
    run.replica.device = SimpleNamespace(type="cuda")
    run.measured_gib = {"load": 1.0, "adapters": 1.25}
    found = memory(
        [
            dict(kind="memory", message=line)
            for line in room.memory_lines(run, run.batches.heaviest())
        ]
    )
    assert found is not None and {phase: got for phase, (_, got) in found["phases"].items()} == {
        "load": 1.0,
        "adapters": 1.25,
        "peak": 3.0,
    }
    assert all(asked is not None for asked, _ in found["phases"].values())


def test_an_older_run_without_newer_fields_opens(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", updates=5, faults=False)
    old = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in old:
        for name in ("optimizer_s", "noise_scale_tokens", "alarms", "schema", "attempt"):
            del record[name]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in old))
    for name in (
        "probes.jsonl",
        "rows.jsonl",
        "plan.json",
        "env.json",
        "config.yaml",
        "events.jsonl",
    ):
        (folder / name).unlink()
    data = payload(read_run(folder))
    assert (
        all(map(math.isnan, decoded(data["columns"]["optimizer_s"])))
        and data["probes"] is None
        and data["plan"] is None
    )
    assert write_report(folder).exists()


def test_probes_of_a_fresh_adapter_have_no_ratio_for_b() -> None:
    names = matrices(1)
    probe = probe_record(1, names, drawn=random.Random(1))
    packed = heat([probe.update_to_weight], len(names))
    assert packed is not None
    codes = np.frombuffer(base64.b64decode(packed["codes"]), dtype="<u2")
    assert [code == 0 for code in codes] == [name.endswith("B") for name in names]
