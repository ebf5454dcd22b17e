"""What a rank says of the others after a collective has failed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glassloop.loop.watchdog import ENDED, WAITS, Watchdog


def watchdog(folder: Path) -> Watchdog:
    found = Watchdog(folder, 0, 2, timeout_s=60, asked_to_stop=lambda: False)
    found.folder.mkdir(parents=True)
    found.does(7, WAITS)
    found._write()
    return found


def other(
    folder: Path, pid: int, doing: str = "computes pass 1 of 4", host: str | None = None
) -> None:
    told = {
        "rank": 1,
        "host": host or socket.gethostname(),
        "pid": pid,
        "update": 7,
        "doing": doing,
        "since": time.time() - 3,
    }
    (folder / "ranks" / "rank1.json").write_text(json.dumps(told))


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_rank_whose_process_is_gone_is_named_with_what_it_did_last(tmp_path, dead_pid):
    dog = watchdog(tmp_path)
    other(tmp_path, dead_pid)
    said = dog.lost(RuntimeError("Connection closed by peer"), wait_s=0)
    assert said is not None
    assert said.startswith("rank 1 is gone: rank 0 ends too, and nothing is saved.")
    assert f"rank 1: update 7, computes pass 1 of 4 (process {dead_pid} is gone)" in said


@pytest.mark.parametrize(
    ("doing", "error", "told"),
    [
        (WAITS, "Timed out", True),
        ("saves a checkpoint", "[gloo/transport/tcp/pair.cc] Timed out waiting 15000ms", True),
        ("saves a checkpoint", "NCCL error: unhandled system error", True),
        ("saves a checkpoint", "shape mismatch", False),
    ],
)
def test_a_collective_that_failed_tells_where_all_were_and_another_error_is_left_alone(
    tmp_path, doing, error, told
):
    dog = watchdog(tmp_path)
    other(tmp_path, os.getpid())
    dog.does(7, doing)
    said = dog.lost(RuntimeError(error), wait_s=0)
    assert (said is not None) == told
    if said is not None:
        assert "rank 0 could not hear from the others" in said
        assert "rank 1: update 7, computes pass 1 of 4 (for 3 s)" in said


def test_of_a_library_s_error_the_first_sentence_is_told(tmp_path):
    dog = watchdog(tmp_path)
    other(tmp_path, os.getpid())
    error = "[/src/gloo/pair.cc:553] Connection closed by peer [::1]:7. Good luck!\nmore"
    said = dog.lost(RuntimeError(error), wait_s=0)
    assert said is not None and "(Connection closed by peer [::1]:7): it ends" in said


@pytest.mark.parametrize(("doing", "host"), [(ENDED, None), ("steps", "another-host")])
def test_a_rank_that_ended_in_order_or_is_on_another_host_is_not_gone(
    tmp_path, dead_pid, doing, host
):
    dog = watchdog(tmp_path)
    other(tmp_path, dead_pid, doing, host)
    assert not any(position.gone for position in dog.positions())


@pytest.mark.parametrize("jump_s", [86_400, -86_400])
def test_a_clock_that_jumps_ends_no_rank(tmp_path, monkeypatch, jump_s):
    dog = watchdog(tmp_path)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + jump_s)
    assert dog.waited_s() < 30
    began = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: began() + 100)
    assert dog.waited_s() >= 100
    dog.does(7, "steps")
    assert dog.waited_s() == 0


def test_one_rank_alone_has_nobody_to_lose(tmp_path):
    alone = Watchdog(tmp_path, 0, 1, timeout_s=60, asked_to_stop=lambda: False)
    alone.start()
    assert alone.lost(RuntimeError("NCCL"), wait_s=0) is None
    assert not (tmp_path / "ranks").exists()
