"""A run has a folder of its own, whoever else begins one at the same moment."""

from __future__ import annotations

import time

import pytest

from glassloop.loop import build


def test_two_runs_that_begin_in_the_same_second_have_two_folders(run_of, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "20261124-120000")
    folders = [run_of(run={"name": None}).folder for _ in range(2)]
    assert folders[0] != folders[1]
    assert all((folder / "config.yaml").is_file() for folder in folders)


def test_a_run_that_was_begun_while_the_model_was_loaded_is_left_alone(run_of, monkeypatch):
    real, others = build.load_engine, []

    def slow(*args, **options):
        others.append(options)
        if len(others) == 1:
            run_of(run={"name": "one"})
        return real(*args, **options)

    monkeypatch.setattr(build, "load_engine", slow)
    with pytest.raises(
        ValueError, match=r"run\.name = one: \S+ already holds a run; choose another name"
    ):
        run_of(run={"name": "one"})
