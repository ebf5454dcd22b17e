"""Lines survive a kill, count attempts, and obey record.text."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from glassloop.disk.publish import write_json, write_text
from glassloop.record import jsonl
from glassloop.record.jsonl import read_jsonl
from glassloop.record.observers import JsonlObserver, RunInfo
from glassloop.record.records import (
    EvaluationRecord,
    Event,
    ProbeRecord,
    RowRecord,
    SampleRecord,
    UpdateRecord,
)

ROOT = Path(__file__).resolve().parents[3]
ID, TEXT = "train:17", "the caller asks for a gift card"


def update_record(update: int = 1, **changes: Any) -> UpdateRecord:
    base = UpdateRecord(
        update=update, updates=60, epoch=0, rows=2, lr=2e-4, loss_nats=2.5, grad_norm_pre_clip=1.234, clip_coef=0.81,
        action="applied", reason=None, supervised_tokens=400, rank_loss_nats=(1.0, 3.0), rank_supervised_tokens=(100, 300),
        rank_real_tokens=(150, 450), rank_slot_tokens=(1000, 1000), rank_passes=(1, 1), rank_grad_norm=(0.7, 0.8),
        rank_cosine=0.9, loss_scale=None, update_s=2.0, compute_s=1.5, reduce_s=0.1, rank_peak_gib=None,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def row_record(update: int = 1, rank: int = 0, row_id: str = ID, **changes: Any) -> RowRecord:
    base = RowRecord(
        update,
        rank,
        row_id=row_id,
        micro_batch=0,
        loss_sum_nats=3.5,
        supervised_tokens=5,
        real_tokens=9,
    )
    return dataclasses.replace(base, **changes)


def probe_record() -> ProbeRecord:
    """Probe one module at update 1, where B is 0."""
    return ProbeRecord(
        update=1, applied=True, matrices=("m.A", "m.B"), grad_norm=(0.0, 1.0), weight_norm=(2.0, 0.0), update_norm=(0.0, 0.1),
        update_to_weight=(0.0, None), unmoved_share=(1.0, 0.0), modules=("m",), delta_norm=(0.2,),
        all_update_to_weight=0.05, all_unmoved_share=0.5,
    )  # fmt: skip


def sample(**changes: Any) -> SampleRecord:
    base = SampleRecord(
        update=1, row_id=ID, base=False, prompt=TEXT, expected=TEXT, answer="scam", answer_tokens=2
    )
    return dataclasses.replace(base, **changes)


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_a_line_is_in_its_file_when_the_call_returns_and_is_one_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[bytes] = []
    write = os.write

    def spy(file: int, data: bytes) -> int:
        writes.append(bytes(data))
        return write(file, data)

    observer = JsonlObserver(tmp_path)
    monkeypatch.setattr(os, "write", spy)
    observer.on_start(RunInfo(str(tmp_path), updates=60, ranks=2))
    observer.on_update(update_record(), (row_record(), row_record(rank=1, row_id="train:18")))
    observer.on_probe(probe_record())
    observer.on_evaluation(
        EvaluationRecord(update=1, loss_nats=2.0, rows=4, supervised_tokens=50, scores={})
    )
    observer.on_event(Event(1, "warning", "look"))
    observer.on_sample(sample())
    lengths = {
        name: len(read_jsonl(tmp_path / name)) for name in os.listdir(tmp_path)
    }  # nothing is closed yet
    once = dict.fromkeys(
        ("metrics.jsonl", "probes.jsonl", "evaluations.jsonl", "events.jsonl", "samples.jsonl"), 1
    )
    assert lengths == once | {"rows.jsonl": 2}
    assert len(writes) == 6
    assert all(data.endswith(b"}\n") for data in writes)
    observer.close()
    observer.close()


def test_a_killed_process_loses_no_update(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from glassloop.record.observers import JsonlObserver
from glassloop.record.records import UpdateRecord
observer = JsonlObserver(Path({str(tmp_path)!r}))
for u in range(1, 21):
    ranks = ((2.5,), (4,), (9,), (9,), (1,), None, None)
    observer.on_update(UpdateRecord(u, 60, 0, 2, 1e-4, 2.5, 1.0, 1.0, "applied", None, 4, *ranks, None, 1.0, 1.0, 0.0, None), ())
os.kill(os.getpid(), signal.SIGKILL)
"""
    ran = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert ran.returncode == -signal.SIGKILL
    assert [line["update"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == list(range(1, 21))


def test_a_torn_last_line_is_left_out_and_mended_wherever_it_was_cut(tmp_path: Path) -> None:
    observer = JsonlObserver(tmp_path)
    observer.on_update(update_record(1), ())
    observer.on_update(update_record(2, reason="｜"), ())  # a cut may fall into a character's bytes
    observer.close()
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole) + 1):
        path.write_bytes(whole[:cut])
        stands = (
            2 if cut >= len(whole) - 1 else 1
        )  # without its line break the second line is whole all the same
        assert len(read_jsonl(path)) == stands
        again = JsonlObserver(tmp_path)
        again.on_update(update_record(3), ())
        again.close()
        assert [line["update"] for line in read_jsonl(path)] == (
            [1, 2, 3] if stands == 2 else [1, 3]
        )
        assert path.read_bytes().endswith(b"}\n")


def test_zeros_that_a_power_loss_left_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"update": 1}\n' + bytes(100))
    JsonlObserver(tmp_path).close()
    assert path.read_bytes() == b'{"update": 1}\n'


def test_damage_before_the_last_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"update": 1}\n{"upd\n{"update": 3}\n')
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}, line 2: .*Remove the line"):
        read_jsonl(path)


@pytest.mark.parametrize(
    "text", ["a\u2028b\x85c", "🦙｜\0\x1b[2J", "lone \ud800 surrogate", 'quote " \\ \r\n']
)
def test_any_text_comes_back_and_stays_on_its_line(tmp_path: Path, text: str) -> None:
    observer = JsonlObserver(tmp_path, "full", lambda row_id: text)
    observer.on_update(update_record(), (row_record(), row_record(row_id="train:18")))
    observer.on_sample(sample(answer=text))
    observer.close()
    assert [line["text"] for line in read_jsonl(tmp_path / "rows.jsonl")] == [text, text]
    assert read_jsonl(tmp_path / "samples.jsonl")[0]["answer"] == text


def test_resumed_at_40_of_55_keeps_every_value_and_counts_attempts(tmp_path: Path) -> None:
    for start, end, attempt in [(1, 55, 1), (41, 50, 2), (41, 60, 3)]:
        observer = JsonlObserver(tmp_path)
        for u in range(start, end + 1):
            tried = observer.attempt(u)
            assert tried == (attempt if u <= 50 else min(attempt, 2) if u <= 55 else 1)
            observer.on_update(update_record(u, attempt=tried), (row_record(u, attempt=tried),))
            assert observer.attempt(u) == tried  # within one process an update is done once
        observer.close()
    kept = [(line["update"], line["attempt"]) for line in read_jsonl(tmp_path / "metrics.jsonl")]
    assert len(kept) == len(set(kept)) == 55 + 10 + 20
    assert [
        (line["update"], line["attempt"]) for line in read_jsonl(tmp_path / "rows.jsonl")
    ] == kept
    assert attempts_in(tmp_path, 40, 41, 51, 56, 61) == [2, 4, 3, 2, 1]


def test_an_update_whose_rows_alone_were_written_gets_a_new_attempt(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"update": 7, "attempt": 1}\n')
    assert attempts_in(tmp_path, 7) == [2]
    (tmp_path / "metrics.jsonl").write_text(
        '{"update": 7, "attempt": 2}\n'
    )  # the second start kept no rows
    assert attempts_in(tmp_path, 7) == [3]
    assert attempts_in(tmp_path / "none", 7) == [1]


def test_an_evaluation_counts_its_own_attempts(tmp_path: Path) -> None:
    observer = JsonlObserver(tmp_path)
    observer.on_evaluation(
        EvaluationRecord(update=20, loss_nats=2.0, rows=4, supervised_tokens=50, scores={})
    )
    observer.close()
    again = JsonlObserver(tmp_path)
    assert (again.evaluation_attempt(20), again.evaluation_attempt(40), again.attempt(20)) == (
        2,
        1,
        1,
    )
    again.close()


def attempts_in(folder: Path, *updates: int) -> list[int]:
    """Return the attempts that a new start would give."""
    observer = JsonlObserver(folder)
    observer.close()
    return [observer.attempt(update) for update in updates]


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


def test_a_full_disk_names_the_file_and_leaves_it_parseable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    observer = JsonlObserver(tmp_path)
    observer.on_update(update_record(1), ())
    write = os.write
    room = [30]

    def nearly_full(file: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = write(file, data[: room[0]])
        room[0] -= taken
        return taken

    monkeypatch.setattr(os, "write", nearly_full)
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(
        OSError, match=rf"{re.escape(str(path))} .*No space left.*--resume"
    ) as caught:
        observer.on_update(update_record(2), ())
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes().endswith(b"}\n")
    assert len(read_jsonl(path)) == 1


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "file" / "run"))):
        JsonlObserver(tmp_path / "file" / "run")


def test_older_schemas_open_and_newer_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"update": 1}\n{"update": 2, "attempt": 3, "schema": 1, "gone": true}\n')
    monkeypatch.setattr(jsonl, "SCHEMA", 2)
    assert read_jsonl(path) == [
        {"update": 1, "attempt": 1, "schema": 0},
        {"update": 2, "attempt": 3, "schema": 1, "gone": True},
    ]
    assert attempts_in(tmp_path, 2) == [4]
    path.write_text('{"update": 1, "schema": 3}\n')
    with pytest.raises(ValueError, match=r"schema 3.* up to 2: update glassloop"):
        read_jsonl(path)


def test_a_checkpoint_event_puts_what_was_written_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    observer = JsonlObserver(tmp_path)
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    observer.on_update(update_record(), (row_record(),))
    observer.on_event(Event(1, "warning", "look"))
    assert synced == []  # an update does not wait for the disk
    observer.on_event(Event(1, "checkpoint", "saved"))
    assert len(set(synced)) == 6
    observer.close()


@pytest.mark.parametrize("broken", ["rename", "fsync"])
def test_a_published_file_is_the_old_one_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = tmp_path / "env.json"
    write_json(path, {"a": "｜", "b": [1, None]})
    assert json.loads(path.read_text()) == {"a": "｜", "b": [1, None]}

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, broken, fail)
        with pytest.raises(OSError, match=r"env\.json .*Input/output error"):
            write_text(path, "new")
    assert json.loads(path.read_text()) == {"a": "｜", "b": [1, None]}
    assert os.listdir(tmp_path) == ["env.json"]  # no temporary file is left
    write_text(path, "new")
    assert path.read_text() == "new"


def test_a_file_is_on_the_disk_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, rename = os.fsync, os.rename

    def spy_fsync(file: int) -> None:
        calls.append(
            "folder"
            if os.path.isdir(f"/proc/self/fd/{file}")
            else f"{os.fstat(file).st_size} bytes"
        )
        fsync(file)

    def spy_rename(source: Any, target: Any) -> None:
        calls.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "rename", spy_rename)
    write_text(tmp_path / "config.yaml", "12345")
    assert calls == ["5 bytes", "rename", "folder"]


def test_json_files_hold_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "plan.json", {"a": math.nan})
    assert os.listdir(tmp_path) == []


def test_an_observer_hands_on_what_it_was_given(tmp_path: Path) -> None:
    record, rows, event = (
        update_record(reason=ID),
        (row_record(),),
        Event(1, "warning", ID, details={"row_ids": [ID]}),
    )
    before = (
        dataclasses.asdict(record),
        [dataclasses.asdict(row) for row in rows],
        dataclasses.asdict(event),
    )
    observer = JsonlObserver(tmp_path, "none")
    observer.on_update(record, rows)
    observer.on_event(event)
    observer.close()
    assert before == (
        dataclasses.asdict(record),
        [dataclasses.asdict(row) for row in rows],
        dataclasses.asdict(event),
    )
