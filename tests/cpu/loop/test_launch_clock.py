"""A run says where the time went from its launch to its first update."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from glassloop.loop.launch_clock import LaunchClock, LaunchObserver, now_s, started_s


def test_a_process_is_dated_by_the_system(tmp_path: Path) -> None:
    assert 0 < started_s() < now_s()  # type: ignore[operator]
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    born = now_s()
    try:
        found = started_s(child.pid)
        assert found is not None and abs(found - born) < 1
    finally:
        child.communicate(b"\n", timeout=30)
    stat = tmp_path / "7" / "stat"
    stat.parent.mkdir()
    ticks = 250 * os.sysconf("SC_CLK_TCK")
    stat.write_text(f"7 (a ) b) S {' '.join('1' * 18)} {ticks} 1 1", encoding="utf-8")
    assert started_s(7, tmp_path) == 250
    stat.write_text("7 (a", encoding="utf-8")
    assert started_s(7, tmp_path) is None and started_s(8, tmp_path) is None


def test_phases_add_up_to_the_whole_time() -> None:
    times = iter([2.0, 2.5, 6.5, 7.0])
    clock = LaunchClock(began=1.0, now=lambda: next(times))
    for phase in ("imports", "base", "evaluation", "evaluation"):
        clock.ends(phase)
    assert clock.phases == {"imports": 1.0, "base": 0.5, "evaluation": 4.5}
    assert clock.details == {"imports_s": 1.0, "base_s": 0.5, "evaluation_s": 4.5, "all_s": 6.0}
    assert str(clock) == (
        "the first update ended 6.0 s after the launch: imports 1.0, base 0.5, evaluation 4.5"
    )


def test_the_launchers_time_counts_where_one_started_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert "launcher" not in LaunchClock().phases
    monkeypatch.setenv("LOCAL_RANK", "0")
    clock = LaunchClock()
    own, parent = started_s(), started_s(os.getppid())
    assert own is not None and parent is not None
    assert clock.phases["launcher"] == pytest.approx(own - parent)


def test_it_is_told_once() -> None:
    told: list[tuple[Any, ...]] = []
    observer = LaunchObserver(LaunchClock(), lambda *args, **details: told.append((args, details)))
    record: Any = type("Record", (), {"update": 3})()
    observer.on_update(record, ())
    observer.on_update(record, ())
    observer.on_evaluation(record)
    assert len(told) == 1 and told[0][0][:2] == (3, "launch")


def test_a_run_records_every_phase(run_of: Any) -> None:
    from train_loop import train

    before = time.monotonic()
    run = run_of(schedule={"updates": 2, "warmup_updates": 0}, execution={"preflight": True})
    assert train(run) == 0
    took = time.monotonic() - before
    run.close()
    lines = (run.folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    (event,) = (one for one in map(json.loads, lines) if one["kind"] == "launch")
    details = event["details"]
    phases = {"imports_s", "ranks_s", "data_s", "base_s", "proof_s", "room_s", "preflight_s"}
    assert set(details) - {"launcher_s"} == phases | {"update_s", "all_s"}
    assert event["update"] == 1 and all(value >= 0 for value in details.values())
    after_imports = details["all_s"] - details["imports_s"] - details.get("launcher_s", 0)
    assert 0 < after_imports <= took + 0.1
    said = event["message"].removeprefix("the first update ended ").split()[0]
    assert float(said) == pytest.approx(details["all_s"], abs=0.06)
