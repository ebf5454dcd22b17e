"""Lines survive a kill, count attempts, and obey record.text."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from made_runs import machine_record
from plain_records import ID, probe_record, row_record, sample, update_record

from glassloop.record import jsonl
from glassloop.record.jsonl import KINDS, read_jsonl
from glassloop.record.observers import JsonlObserver, RunInfo
from glassloop.record.records import (
    EvaluationRecord,
    Event,
)

ROOT = Path(__file__).resolve().parents[3]


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
    observer.on_machine(machine_record(1, 2, slow=None))
    observer.on_probe(probe_record())
    observer.on_evaluation(
        EvaluationRecord(update=1, loss_nats=2.0, rows=4, supervised_tokens=50, scores={})
    )
    observer.on_event(Event(1, "warning", "look"))
    observer.on_sample(sample())
    lengths = {
        name: len(read_jsonl(tmp_path / name)) for name in os.listdir(tmp_path)
    }  # nothing is closed yet
    assert lengths == dict.fromkeys(KINDS, 1) | {"rows.jsonl": 2}
    assert len(writes) == 7
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
    numbers = (u, 60, 0, 2, 1e-4, 2.5, 1.0, 1.0, "applied", None, 4)
    observer.on_update(UpdateRecord(*numbers, *ranks, None, 1.0, 1.0, 0.0, None), ())
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


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "No space left on device"),
        (errno.EDQUOT, "Disk quota exceeded"),
        (errno.EROFS, "Read-only file system"),
    ],
)
def test_a_disk_that_refuses_is_named_and_leaves_the_file_parseable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    observer = JsonlObserver(tmp_path)
    observer.on_update(update_record(1), ())
    write = os.write
    room = [30]

    def nearly_full(file: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(number, said)
        taken = write(file, data[: room[0]])
        room[0] -= taken
        return taken

    monkeypatch.setattr(os, "write", nearly_full)
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(OSError, match=rf"{re.escape(str(path))} .*{said}.*--resume") as caught:
        observer.on_update(update_record(2), ())
    assert caught.value.errno == number
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
    assert len(set(synced)) == 7
    observer.close()


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
