"""The live view follows a run in every state and size."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import pytest
from made_runs import BROKEN, update_record, write_run
from rich.console import Console

from glassloop.cli.__main__ import main
from glassloop.record.observers import JsonlObserver
from glassloop.record.records import Event, to_json
from glassloop.report.following import Tail, Watched
from glassloop.report.watching import Screen, sparkline


def shown(watched: Watched, width: int = 100, height: int = 30) -> str:
    console = Console(width=width, height=height, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(Screen(watched))
    return captured.get()


def test_a_tail_gives_each_line_once_and_waits_for_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.new() == ([], False)
    drawn = random.Random(1)
    first, second = (to_json(update_record(u, 10, drawn=drawn)).encode() + b"\n" for u in (1, 2))
    path.write_bytes(first + second[:5])
    assert seen(tail) == ([1], False)
    assert seen(tail) == ([], False)
    with path.open("ab") as file:
        file.write(second[5:])
    assert seen(tail) == ([2], False)
    path.write_bytes(first)  # shorter: begun anew
    assert seen(tail) == ([1], True)


def seen(tail: Tail) -> tuple[list[int], bool]:
    records, anew = tail.new()
    return [record["update"] for record in records], anew


def test_a_growing_run_is_followed_to_its_end(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    jsonl = JsonlObserver(folder, "none")
    watched = Watched(folder)
    watched.refresh()
    assert "no update yet" in shown(watched)
    drawn = random.Random(1)
    jsonl.on_event(Event(0, "started", "run folder"))
    for update in range(1, 4):
        jsonl.on_update(update_record(update, 10, drawn=drawn), ())
        watched.refresh()
        assert f"{update}/10 updates" in shown(watched)
    assert "running, about 0:14 left" in shown(watched)
    jsonl.on_event(Event(3, "failed", "planted", "type this"))
    watched.refresh()
    text = shown(watched)
    assert "failed: planted" in text and "type: type this" in text and watched.end is not None
    jsonl.close()


def test_an_update_that_is_done_again_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    watched = Watched(write_run(tmp_path / "run"))
    watched.refresh()
    assert [record["update"] for record in watched.updates] == list(range(1, 41))


def test_a_skipped_update_and_its_command_are_shown(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", updates=BROKEN + 1)
    watched = Watched(folder)
    watched.refresh()
    text = shown(watched, width=140)
    assert (
        "SKIPPED: loss is not finite" in text
        and f"--update {BROKEN} --bisect" in text
        and "✕" in text
    )


def test_silence_is_told_from_work(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", updates=5, faults=False, end=None)
    watched = Watched(folder)
    watched.refresh()
    assert "running" in shown(watched)
    old = time.time() - 600
    os.utime(folder / "metrics.jsonl", (old, old))
    assert "no new update for 10:0" in shown(watched)


@pytest.mark.parametrize("jump_s", [1e6, -1e6])
def test_a_clock_that_jumps_breaks_no_view(tmp_path: Path, jump_s: float) -> None:
    folder = write_run(tmp_path / "run", updates=5, faults=False, end=None)
    (folder / "ranks").mkdir()
    told = {"rank": 0, "update": 5, "doing": "waits", "since": time.time() + jump_s}
    (folder / "ranks/rank0.json").write_text(json.dumps(told))
    os.utime(folder / "metrics.jsonl", (time.time() + jump_s,) * 2)
    watched = Watched(folder)
    watched.refresh()
    assert ("no new update for 277:46:4" in shown(watched)) == (jump_s < 0)
    assert ("waits, for 0:00" in shown(watched)) == (jump_s > 0)


def test_ranks_say_what_they_do_while_the_run_goes(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", updates=5, faults=False, end=None)
    (folder / "ranks").mkdir()
    for rank in range(2):
        position = dict(
            rank=rank,
            host="h",
            pid=1,
            update=6,
            doing=f"computes pass {rank + 1} of 2",
            since=time.time() - 3,
        )
        (folder / "ranks" / f"rank{rank}.json").write_text(json.dumps(position))
    watched = Watched(folder)
    watched.refresh()
    assert "rank 1: update 6, computes pass 2 of 2, for 0:03" in shown(watched)


def test_a_hostile_message_cannot_move_the_cursor(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", updates=3, faults=False, end=None)
    jsonl = JsonlObserver(folder, "none")
    jsonl.on_event(Event(3, "warning", "\x1b[2Jgone [red]bold[/red]", "rm \x1b[A"))
    jsonl.close()
    watched = Watched(folder)
    watched.refresh()
    text = shown(watched)
    assert "\x1b" not in text and r"\x1b[2Jgone [red]bold[/red]" in text


@pytest.mark.parametrize(("width", "height"), [(40, 10), (80, 24), (200, 60)])
def test_it_fits_the_terminal(tmp_path: Path, width: int, height: int) -> None:
    watched = Watched(write_run(tmp_path / "run"))
    watched.refresh()
    lines = shown(watched, width, height).splitlines()
    assert max(map(len, lines)) <= width
    if height >= 24:
        assert len(lines) <= height


def test_a_sparkline_shows_what_is_absent_broken_and_far_off() -> None:
    assert sparkline([0.0, 1.0, None, float("nan")], 4) == "▁█ ✕"
    assert sparkline([], 10) == ""
    assert sparkline([1.0, 1.0], 10) == "▁▁"
    assert len(sparkline([float(i) for i in range(1000)], 50)) == 50
    with_spike = sparkline([*(float(i % 5) for i in range(40)), 1e6], 60)
    assert with_spike[-1] == "↑" and "█" in with_spike[:-1]
    assert sparkline([1.0, 9.0, 1.0, 1.0], 2, largest=True) == "█▁"


@pytest.mark.parametrize(("end", "code"), [("finished", 0), ("stopped", 0), ("failed", 1)])
def test_the_command_leaves_when_the_run_has_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], end: str, code: int
) -> None:
    folder = write_run(tmp_path / "run", updates=4, faults=False, end=end)
    assert main(["watch", str(folder)]) == code
    assert "4/4 updates" in capsys.readouterr().out


def test_what_cannot_be_watched_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch", str(tmp_path / "nowhere")]) == 2
    assert main(["watch", str(tmp_path), "--every", "0"]) == 2
    err = capsys.readouterr().err
    assert "is no folder" in err and "at least 0.1" in err
