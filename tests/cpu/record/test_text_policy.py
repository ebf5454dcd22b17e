"""record.text decides which ids and texts any file holds."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from plain_records import ID, TEXT, row_record, sample, update_record

from glassloop.record.jsonl import read_jsonl
from glassloop.record.observers import JsonlObserver
from glassloop.record.records import (
    Event,
)


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def write_one_of_each(folder: Path, policy: Any) -> None:
    observer = JsonlObserver(folder, policy, lambda row_id: TEXT)
    reason = f"loss is not finite: rank 1, pass 0, row {ID}"
    rows = (row_record(), row_record(rank=1, row_id="train:1", loss_sum_nats=math.nan))
    observer.on_update(update_record(action="skipped", reason=reason), rows)
    observer.on_event(Event(1, "skipped", reason, command=f"glassloop data --row {ID}"))
    details = {
        "rows": [f"{ID}:4", "train:99"],
        "at": [{"row_id": ID, "text": TEXT}],
        "count": {"rows": 2},
    }
    observer.on_event(
        Event(1, "warning", f"rows {ID}:4, train:99, train:999 are long", details=details)
    )
    observer.on_sample(sample())
    observer.close()


def test_text_none_keeps_ids_and_text_of_rows_out_of_every_file(tmp_path: Path) -> None:
    write_one_of_each(tmp_path, "none")
    assert sorted(os.listdir(tmp_path)) == [
        "evaluations.jsonl",
        "events.jsonl",
        "machine.jsonl",
        "metrics.jsonl",
        "probes.jsonl",
    ]
    assert ID.encode() not in everything(tmp_path)
    assert b"gift card" not in everything(tmp_path)
    assert (
        read_jsonl(tmp_path / "metrics.jsonl")[0]["reason"]
        == "loss is not finite: rank 1, pass 0, row (row)"
    )
    skipped, warning = read_jsonl(tmp_path / "events.jsonl")
    assert skipped["command"] == "glassloop data --row (row)"
    assert (
        warning["message"] == "rows (row), (row), train:999 are long"
    )  # not in details: an id of another row would have been there
    assert warning["details"] == {"at": [{}], "count": {"rows": 2}}  # a count is no id


def test_text_ids_keeps_ids_and_no_text(tmp_path: Path) -> None:
    write_one_of_each(tmp_path, "ids")
    assert b"gift card" not in everything(tmp_path)
    assert [line["row_id"] for line in read_jsonl(tmp_path / "rows.jsonl")] == [ID, "train:1"]
    assert read_jsonl(tmp_path / "events.jsonl")[1]["details"]["at"] == [{"row_id": ID}]
    (kept,) = read_jsonl(tmp_path / "samples.jsonl")
    assert (kept["answer"], kept["row_id"], kept["prompt"], kept["expected"]) == (
        "scam",
        ID,
        None,
        None,
    )


def test_text_full_keeps_both(tmp_path: Path) -> None:
    write_one_of_each(tmp_path, "full")
    assert [line["text"] for line in read_jsonl(tmp_path / "rows.jsonl")] == [TEXT, TEXT]
    assert read_jsonl(tmp_path / "events.jsonl")[1]["details"]["at"] == [
        {"row_id": ID, "text": TEXT}
    ]
    assert read_jsonl(tmp_path / "samples.jsonl")[0]["prompt"] == TEXT


def test_a_poisoned_micro_batch_is_found_by_update_rank_pass_and_row(tmp_path: Path) -> None:
    write_one_of_each(tmp_path, "ids")
    (metric,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert (metric["update"], metric["action"]) == (1, "skipped")
    assert "rank 1, pass 0" in metric["reason"]
    (bad,) = [
        line
        for line in read_jsonl(tmp_path / "rows.jsonl")
        if not math.isfinite(float(line["loss_sum_nats"]))
    ]
    assert (bad["rank"], bad["micro_batch"], bad["row_id"]) == (1, 0, "train:1")
