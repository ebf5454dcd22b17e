"""A run keeps a folder of its own, whatever others do."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

import pytest

from glassloop.disk.lock import LOCK, FolderMoved, Held
from glassloop.loop import build, starting
from train_loop import train


def test_two_runs_that_begin_in_the_same_second_have_two_folders(run_of, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "20261124-120000")
    folders = [run_of(run={"name": None}).folder for _ in range(2)]
    assert folders[0] != folders[1]
    assert all((folder / "config.yaml").is_file() for folder in folders)


def test_a_second_run_of_the_name_is_refused_before_it_reads_data_or_model(run_of, monkeypatch):
    first = run_of(run={"name": "one"})
    monkeypatch.setattr(build, "check_no_run_in", lambda folder: None)
    (first.folder / "config.yaml").unlink()  # as while the first one loads its model
    monkeypatch.setattr(build, "read_rows", lambda start: pytest.fail("it read the data"))
    with pytest.raises(Held, match=rf"runs/one is being written by process {os.getpid()} on "):
        run_of(run={"name": "one"})
    first.close_observers()


def test_a_run_that_began_and_ended_just_before_the_lock_is_left_alone(run_of, monkeypatch):
    genuine = starting.claim

    def late(folder, *args, **options):
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("theirs")
        return genuine(folder, *args, **options)

    monkeypatch.setattr(starting, "claim", late)
    with pytest.raises(
        ValueError, match=r"run\.name = one: \S+ already holds a run; choose another name"
    ) as refused:
        run_of(run={"name": "one"})
    folder = Path(str(refused.value).split()[3])
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]  # no lock stays behind
    assert (folder / "config.yaml").read_text() == "theirs"


def test_a_run_that_is_refused_late_leaves_no_folder(run_of, monkeypatch, tmp_path):
    def broken(*_args, **_options):
        raise ValueError("no such model")

    monkeypatch.setattr(build, "load_replica", broken)
    with pytest.raises(ValueError, match="no such model"):
        run_of(run={"name": "refused", "dir": str(tmp_path / "runs")})
    assert list((tmp_path / "runs").iterdir()) == []


def at_update(run, update, action):
    """Let `action` happen between two updates, as another process would do it."""
    genuine = run.inspection.half_way

    def half_way(window):
        if window.update == update:
            action()
        return genuine(window)

    run.inspection.half_way = half_way


@pytest.mark.parametrize("captured", [[], [3]], ids=["before a record", "before a capsule"])
def test_a_run_whose_folder_is_renamed_ends_and_names_the_new_place(captured, run_of):
    run = run_of(
        run={"name": "old"},
        schedule={"updates": 6},
        checkpoint={"every_updates": 1},
        record={"capture_updates": captured},
    )
    new = run.folder.with_name("new")
    at_update(run, 3, lambda: run.folder.rename(new))
    with pytest.raises(FolderMoved, match=rf"was renamed in mid-run, its files are in {new}: "):
        train(run)
    run.close()
    assert not run.folder.exists()  # nothing was made under the old name
    lines = [json.loads(line) for line in (new / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [1, 2]
    assert [path.name for path in sorted((new / "checkpoints").glob("update_*"))][-1] == (
        "update_000002"
    )
    assert not (new / LOCK).exists()
    resumed = run_of(resume={"run": str(new)}, schedule={"updates": 6})
    assert resumed.first_update == 3
    resumed.close_observers()


@pytest.mark.parametrize("on_failure", ["warn", "stop"])
def test_a_folder_that_becomes_read_only_keeps_its_checkpoints_and_the_run_ends_with_1(
    on_failure, run_of, monkeypatch
):
    every = {"every_updates": 1, "keep": 9, "on_failure": on_failure}
    schedule = {"updates": 4, "warmup_updates": 1}
    run = run_of(run={"name": "sealed"}, schedule=schedule, checkpoint=every)
    genuine = os.mkdir

    def sealed(path, *args, **options):
        if str(path).startswith(str(run.folder)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        genuine(path, *args, **options)

    at_update(run, 3, lambda: monkeypatch.setattr(os, "mkdir", sealed))
    assert train(run) == 1
    run.close_observers()
    saved = sorted(path.name for path in (run.folder / "checkpoints").glob("update_*"))
    assert saved == ["update_000001", "update_000002"]
    events = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    warnings = [event["message"] for event in events if event["kind"] == "warning"]
    assert "Read-only file system" in warnings[0]
    assert "make the folder writable for this user, or set run.dir to one that is" in warnings[0]
    metrics = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert len(metrics) == (4 if on_failure == "warn" else 3)
