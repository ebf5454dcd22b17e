"""A rank dies or hangs: the other rank ends soon and names it.

The last checkpoint stays as it was, and the run resumes from it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import launching
import pytest
from launching import LAUNCH, ROOT, TWO_CPUS, ranks_of, write_rows

from glassloop.disk.lock import LOCK
from glassloop.loop.watchdog import _alive

TRAIN = ROOT / "train_loop.py"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> list[str]:
    folder = tmp_path_factory.mktemp("lost")
    rows = write_rows(folder / "rows.jsonl", 37)
    return [
        f"model.id={tiny_llama}", f"data.source={rows}", "data.template=chat",
        "data.max_tokens=96", "lora.r=4", "batch.size=1", "batch.accumulation=2",
        "schedule.updates=400", "execution.precision=fp32", "evaluation.samples=0",
        "checkpoint.every_updates=5", "checkpoint.keep=100", "execution.collective_timeout_s=60",
        f"run.dir={folder}",
    ]  # fmt: skip


def start(words: list[str], name: str, *launcher: str, cold: bool = False) -> subprocess.Popen[str]:
    return started([*words, f"run.name={name}"], *launcher, cold=cold)


def started(words: list[str], *launcher: str, cold: bool = False) -> subprocess.Popen[str]:
    command = [*LAUNCH, str(TWO_CPUS), *launcher, str(TRAIN), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return launching.start(command, cold=cold, start_new_session=True, **pipes)


def events_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def output_of_orphans(process: subprocess.Popen, within_s: float) -> str:
    """Kill a launcher at once; what its ranks print until the last one has ended, in time."""
    ranks = ranks_of(process.pid)
    process.kill()
    killed = time.monotonic()
    output, _ = process.communicate(timeout=within_s)  # the ranks keep the pipe open
    assert time.monotonic() - killed < within_s
    assert len(ranks) == 2
    assert not any(map(_alive, ranks))
    return output


def updates(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def pid_of_rank(folder: Path, rank: int, after_updates: int) -> int:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (
            updates(folder) >= after_updates
            and (path := folder / "ranks" / f"rank{rank}.json").exists()
        ):
            return json.loads(path.read_text())["pid"]
        time.sleep(0.05)
    raise AssertionError("the run did not get there")


def alive(pid: int) -> bool:
    """Whether the process runs or is stopped, and is no mere entry that awaits its parent."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def checkpoints(folder: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes()
        for path in sorted((folder / "checkpoints").rglob("*"))
        if path.is_file()
    }


@pytest.mark.thorough
def test_a_killed_rank_ends_the_other_one_and_a_killed_launcher_both_with_a_checkpoint(words):
    folder = Path(words[-1][8:]) / "killed"
    process = start(words, "killed", cold=True)
    pid = pid_of_rank(folder, 1, after_updates=8)
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - killed < 20  # the launcher itself would wait for 30 s
    assert process.returncode != 0
    assert "rank 1 is gone: rank 0 ends too, and nothing is saved" in output
    assert f"process {pid} is gone" in output
    saved = checkpoints(folder)
    last = max(
        json.loads(data)["update"] for name, data in saved.items() if name.endswith("state.json")
    )
    assert last % 5 == 0  # a periodic one: nothing was saved on the way out
    resume = ["--resume", str(folder), "--at", str(last), "checkpoint.every_updates=null"]
    resumed = started(resume)
    before = updates(folder)
    pid_of_rank(folder, 1, after_updates=before + 4)
    told = output_of_orphans(resumed, within_s=40)
    event = events_of(folder)[-1]
    assert event["kind"] == "stopped"
    assert f"the launcher, process {resumed.pid}, is gone" in event["message"]
    assert event["update"] == last + updates(folder) - before
    assert (folder / f"checkpoints/update_{event['update']:06d}").is_dir()
    assert told.rstrip().endswith(f"--resume {folder}")  # the last line
    assert not (folder / LOCK).exists()


@pytest.mark.thorough
def test_a_hanging_rank_is_given_up_with_the_position_of_each(words):
    folder = Path(words[-1][8:]) / "hung"
    process = start([*words, "execution.collective_timeout_s=10"], "hung")
    pid, other = (pid_of_rank(folder, rank, after_updates=3) for rank in (1, 0))
    os.kill(pid, signal.SIGSTOP)
    try:
        deadline = time.monotonic() + 60
        while alive(other) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not alive(other), "rank 0 waits on"
        os.kill(pid, signal.SIGCONT)  # or the launcher waits for it for 30 s
        output, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert "Last seen: rank 0: update" in output
    assert "rank 1: update" in output
    assert re.search(
        r"Stuck in collective \d+, .*: entered by rank 0, rank 1 does not answer\.", output
    ), output[-3000:]


@pytest.mark.thorough
def test_with_max_restarts_the_run_goes_on_by_itself(words):
    folder = Path(words[-1][8:]) / "restarted"
    short = [
        word if not word.startswith("schedule.updates") else "schedule.updates=60" for word in words
    ]
    process = start(short, "restarted", "--max_restarts", "1")
    pid = pid_of_rank(folder, 1, after_updates=12)
    os.kill(pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-3000:]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = {line["update"]: line["attempt"] for line in lines}
    assert sorted(last) == list(range(1, 61))
    assert (last[1], last[60]) == (1, 2)  # what came after the last checkpoint was done again
    events = [
        json.loads(line)["kind"] for line in (folder / "events.jsonl").read_text().splitlines()
    ]
    assert events.count("resumed") == 1


@pytest.mark.thorough
def test_ranks_whose_launcher_is_killed_during_start_up_end_too(words):
    process = start(words, "orphaned", cold=True)
    deadline = time.monotonic() + 60
    while len(ranks_of(process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    output = output_of_orphans(process, within_s=90)  # imports alone take 8 s, and more under load
    assert "is gone" in output
    assert not (Path(words[-1][8:]) / "orphaned").exists()


@pytest.mark.parametrize(
    ("number", "to_all"),
    [(signal.SIGTERM, True), (signal.SIGHUP, False), (signal.SIGINT, False)],
    ids=["SIGTERM to all processes, as SLURM", "SIGHUP, as a lost ssh", "SIGINT, as Ctrl-C"],
)
def test_a_signal_saves_a_checkpoint_of_what_is_done(words, number, to_all):
    folder = Path(words[-1][8:]) / f"ended_by_{number.name}"
    process = start([*words, "checkpoint.every_updates=null"], folder.name)
    pid_of_rank(folder, 1, after_updates=6)
    (os.killpg if to_all else os.kill)(process.pid, number)
    asked = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - asked < 25  # the launcher kills after 30
    event = events_of(folder)[-1]
    assert event["kind"] == "stopped"
    assert number.name in event["message"]
    ours = output.partition("Traceback")[0]  # the launcher's own, which it prints when it is asked
    assert f"--resume {folder}" in ours.split("report ")[1]
    (saved,) = [
        json.loads(data)["update"]
        for name, data in checkpoints(folder).items()
        if name.endswith("state.json")
    ]
    assert saved == updates(folder) >= 6
