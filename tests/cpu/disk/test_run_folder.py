"""A run has a folder of its own, whoever else begins one at the same moment."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from glassloop.disk.lock import Held
from glassloop.loop import build


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
    genuine = build.claim

    def late(folder, *args, **options):
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("theirs")
        return genuine(folder, *args, **options)

    monkeypatch.setattr(build, "claim", late)
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
