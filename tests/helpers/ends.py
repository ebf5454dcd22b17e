"""Many runs of two ranks, ended under load.

Measures how long each rank stays after the report.

    ends.py FOLDER MODEL ROWS [--runs N] [--load K] [--longest S]

Ranks are forks of this process, whose imports are warm, and leave as `train_loop.py` does. Explicit
and DDP reduction alternate. K processes keep the cores busy meanwhile. Ends with 1 if a rank ended
with another code than 0, or stayed over S seconds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import tqdm

import train_loop
from glassloop.loop.guard import end_process

GIVEN_UP_S = 180.0  # of a whole run


def words_of(asked: argparse.Namespace, name: str, reduction: str) -> list[str]:
    return [
        f"model.id={asked.model}",
        f"data.source={asked.rows}",
        "data.template=chat",
        "data.max_tokens=96",
        "lora.r=4",
        "batch.size=2",
        "batch.accumulation=1",
        "schedule.updates=2",
        "schedule.warmup_updates=1",
        "execution.precision=fp32",
        "execution.preflight=false",
        f"execution.reduction={reduction}",
        "execution.engine=peft",
        "evaluation.samples=0",
        f"run.dir={asked.folder / 'runs'}",
        f"run.name={name}",
    ]


def forked(rank: int, port: int, words: list[str], log: Path) -> int:
    """Start a rank in a fork of this process; returns its pid."""
    child = os.fork()
    if child == 0:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(output, 1)
        os.dup2(output, 2)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        os.environ.update({name: str(value) for name, value in place.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        os.environ["ACCELERATE_USE_CPU"] = "true"
        code = 99
        try:
            code = train_loop.main(words)
        finally:
            end_process(code)
    return child


def ended(pid: int, until: float) -> tuple[int | None, float]:
    """Exit code and time of a rank's end.

    None, after a kill, for one that stayed.
    """
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), time.time()
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None, time.time()


def busy() -> None:
    while True:
        pass


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--load", type=int, default=2)
    parser.add_argument("--longest", type=float, default=25.0)
    asked = parser.parse_args()
    tqdm.tqdm.monitor_interval = 0  # no thread that a fork would lose
    load = [multiprocessing.Process(target=busy, daemon=True) for _ in range(asked.load)]
    for process in load:
        process.start()
    stayed, wrong = [], []
    for run in range(asked.runs):
        name, port = f"end{run}", free_port()
        words = words_of(asked, name, ("ddp", "explicit")[run % 2])
        log, until = asked.folder / f"{name}.txt", time.monotonic() + GIVEN_UP_S
        ends = [ended(pid, until) for pid in [forked(rank, port, words, log) for rank in (0, 1)]]
        report = asked.folder / "runs" / name / "report.html"
        written = report.stat().st_mtime if report.exists() else 0.0
        stayed.append(max(at for _, at in ends) - written)
        if [code for code, _ in ends] != [0, 0] or stayed[-1] > asked.longest:
            wrong.append(f"{name}: codes {[code for code, _ in ends]}, {stayed[-1]:.1f} s ({log})")
    for process in load:
        process.terminate()
    stayed.sort()
    print(
        f"ends: {len(stayed)} runs of two ranks beside {asked.load} busy processes; after the "
        f"report the last rank stayed {stayed[len(stayed) // 2]:.2f} s (median), "
        f"{stayed[-1]:.2f} s (longest); {len(wrong)} wrong",
        file=sys.stderr,
    )
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
