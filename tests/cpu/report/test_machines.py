"""The machine of a run in report, live view and comparison, and in an older folder without it."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
from made_runs import REDONE, SLOW, machine_record, update_record, write_run
from rich.console import Console

from glassloop.record.observers import JsonlObserver
from glassloop.record.reading import read_run
from glassloop.record.records import Event
from glassloop.report.compare_text import render
from glassloop.report.comparing import compare
from glassloop.report.following import Watched
from glassloop.report.machines import (
    last_reading,
    machine_columns,
    machine_facts,
    slow_updates,
)
from glassloop.report.payload import payload
from glassloop.report.watching import Screen


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "planted")


def test_the_page_has_each_rank_s_readings_and_the_slow_update(planted: Path) -> None:
    run = read_run(planted)
    data = payload(run)
    assert set(data["machine"]) == {"clock", "power", "heat", "busy", "host_gib"}
    assert all(len(columns) == 2 for columns in data["machine"].values())
    assert data["slow"] == {SLOW: "throttled"}
    assert [record["attempt"] for record in run.machine if record["update"] == REDONE] == [2]


def test_several_slow_updates_are_one_sentence_on_the_worst(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", faults=False)
    jsonl = JsonlObserver(folder, "none")
    for update, took, attempt in ((9, 4.0, 1), (20, 9.0, 1), (21, 99.0, 7)):
        details = {"cause": "disk", "took_s": took, "expected_s": 2.0}
        said = f"update {update} took {took:g} s where 2 s were usual: disk"
        jsonl.on_event(Event(update, "slow", said, None, details, attempt=attempt))
    jsonl.close()
    (said,) = slow_updates(read_run(folder))
    assert said.update == 20  # update 21's attempt 7 does not stand
    assert said.text == (
        "Update 20 took 9 s where 2 s were usual: disk. 2 updates were slow (2 x disk)."
    )


def test_odd_details_of_a_slow_event_break_nothing(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", faults=False)
    jsonl = JsonlObserver(folder, "none")
    for details in ({}, {"took_s": "x", "expected_s": 0}, {"cause": [1], "took_s": 1.0}):
        jsonl.on_event(Event(5, "slow", "update 5", None, details))
    jsonl.close()
    assert len(slow_updates(read_run(folder))) == 1


def test_a_run_of_an_older_glassloop_has_no_machine(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "machine.jsonl").unlink()
    run = read_run(folder)
    assert run.machine == [] and machine_columns(run) == {}
    assert set(machine_facts(run).values()) == {None}
    assert last_reading(None) == ""
    assert "machine, medians" not in printed(render(compare([run, read_run(folder)])))


def test_facts_count_heat_and_not_the_power_cap(planted: Path) -> None:
    facts = machine_facts(read_run(planted))
    assert (facts["throttled updates"], facts["slow updates"]) == (1.0, 1.0)
    assert facts["card's clock, MHz"] == pytest.approx(1701, abs=1)


def test_a_comparison_puts_machines_beside_each_other(planted: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "calm", faults=False, seed=2)
    shown = printed(render(compare([read_run(planted), read_run(other)])))
    assert "machine, medians" in shown and "throttled updates" in shown
    assert "card's clock, MHz" in shown


def test_the_live_view_names_the_hottest_card(tmp_path: Path) -> None:
    folder, drawn = tmp_path / "run", random.Random(1)
    jsonl = JsonlObserver(folder, "none")
    jsonl.on_update(update_record(1, 10, drawn=drawn), ())
    jsonl.on_machine(machine_record(1, 2, slow="throttled"))
    watched = Watched(folder)
    watched.refresh()
    assert "card of rank 1 88 C, 601 W, 900 MHz, heat" in printed(Screen(watched))
    blind = dataclasses.replace(machine_record(1, 2, slow=None), rank_temperature_c=(None, None))
    assert last_reading(json.loads(json.dumps(dataclasses.asdict(blind)))) == ""


def printed(shown: object) -> str:
    console = Console(width=160, height=40, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(shown)
    return captured.get()
