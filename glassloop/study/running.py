"""Run a study's cells in processes of their own. No torch.

A cell is done if its run's folder holds the config that is asked now, the last update and the end.
So a study that was killed at any moment continues with the same command. A cell holds a lock while
it runs. A cell that outlived its study keeps the lock, and is waited for instead of run twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import glassloop
from glassloop.config.arguments import to_yaml
from glassloop.disk.opening import open_plain, read_plain, require_plain_folder
from glassloop.disk.publish import write_text
from glassloop.predict.hardware import gpus_present
from glassloop.study.cell_state import ATTEMPTS, attempts, run_folder, state_of
from glassloop.study.checks import StudyError
from glassloop.study.spec import Cell
from glassloop.verify.processes import LAUNCHER_VARIABLES, launch_file

APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT
POLL_S = 0.2
PATIENCE_S = 20.0  # for a cell that is asked to end
LAST_WORDS = 600  # characters of what a failed cell printed


@dataclass
class Going:
    """A cell under way."""

    cell: Cell
    process: subprocess.Popen[bytes]
    slot: tuple[str, ...]
    began: float
    beside: int  # cells that ran when it began, itself included
    lock: int
    told: bool = field(default=False)  # to end

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


def run_cells(
    cells: Sequence[Cell],
    out: Path,
    *,
    parallel: int,
    timeout_s: float,
    say: Callable[[str], None],
    again: bool = False,
    deadline: float | None = None,
) -> dict[str, str]:
    """Run the cells that are not done yet.

    Returns {cell: why there is no result} of those that failed or were not reached.

    Args:
        parallel: cells beside each other on a device (or set of devices, where a cell has several
            ranks).
        again: also what is done, or was run with another config.
        deadline: time.monotonic() at which cells under way are ended; none is begun that would not
            be done by then.

    Raises:
        StudyError: a cell's folder holds a run of another config.
    """
    waiting = [cell for cell in cells if not _done_before(cell, out, again)]
    if len(waiting) < len(cells):
        say(f"{len(cells) - len(waiting)} of {len(cells)} cells are done already")
    slots = _slots(cells, parallel)
    known = [
        line["seconds"]
        for line in attempts(out)
        if line["exit_code"] == 0 and line["cell"] in {cell.name for cell in cells}
    ]
    going: list[Going] = []
    failed: dict[str, str] = {}
    done, total = 0, len(waiting)
    try:
        while waiting or going:
            for one in [one for one in going if one.process.poll() is not None]:
                going.remove(one)
                os.close(one.lock)
                done += 1
                why = _after(one, out, timeout_s)
                known += [one.seconds] if why is None else []
                if why is not None:
                    failed[one.cell.name] = why
                say(
                    f"[{done}/{total}] {one.cell.name}: {why or 'done'} ({one.seconds:.0f} s, "
                    f"{one.beside} beside each other)"
                )
            free = [
                slot for slot in slots if slots.count(slot) > sum(one.slot == slot for one in going)
            ]
            left_s = float("inf") if deadline is None else deadline - time.monotonic()
            if waiting and left_s < max(known, default=0.0):
                failed |= {cell.name: f"not begun: {left_s:.0f} s were left" for cell in waiting}
                waiting = []
            elif waiting and free:
                cell = waiting.pop(0)
                slot = min(free, key=lambda one: sum(other.slot == one for other in going))
                # A cell that outlived an earlier study; others first.
                if (lock := _locked(cell, out)) is None:
                    waiting.append(cell)
                elif not again and state_of(cell, out).finished:  # it has ended meanwhile
                    os.close(lock)
                    done += 1
                    continue
                else:
                    going.append(_begin(cell, out, slot, len(going) + 1, lock, parallel))
                    continue
            for one in going:
                if not one.told and (one.seconds > timeout_s or left_s <= 0):
                    one.told = True
                    _signal(one.process, signal.SIGTERM)
            time.sleep(POLL_S)
    finally:
        end_all(going)
    return failed


def command(cell: Cell, out: Path) -> list[str]:
    """How the cell's process is started; writes the files that it reads."""
    asked = _room(out, "asked") / f"{cell.name}.yaml"
    write_text(asked, to_yaml(cell.config))
    ranks = cell.config.batch.ranks or 1
    words = ["train_loop", "--config", str(asked)]
    if cell.config.model.trust_remote_code:  # the study's command line said so
        words.append("model.trust_remote_code=true")
    if ranks == 1:
        return [sys.executable, "-m", *words]
    launch = out / "asked" / "launch.yaml"
    write_text(launch, launch_file("cuda" if gpus_present() else "cpu"))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launch)]
    return [*launcher, "--num_processes", str(ranks), "--module", *words]


def environment(slot: tuple[str, ...], parallel: int) -> dict[str, str]:
    """Return the environment of a cell's process.

    It has no other launcher's variables, the cell's own devices, and this very glassloop.
    """
    left_out = (*LAUNCHER_VARIABLES, "ACCELERATE_MIXED_PRECISION")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in left_out and not name.startswith("TORCHELASTIC_")
    }
    here = str(Path(glassloop.__file__).resolve().parents[1])
    threads = str(max(1, (os.cpu_count() or 1) // parallel))
    kept = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"} | kept
    kept |= {
        "PYTHONPATH": os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "CUDA_VISIBLE_DEVICES": ",".join(slot),
    }
    return kept if slot else kept | {"ACCELERATE_USE_CPU": "true"}


def end_all(going: Sequence[Going]) -> None:
    """End cells and their processes.

    Each may write what it has to first.
    """
    for one in going:
        _signal(one.process, signal.SIGTERM)
    for one in going:
        try:
            one.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            _signal(one.process, signal.SIGKILL)
            one.process.wait()
        os.close(one.lock)


def _done_before(cell: Cell, out: Path, again: bool) -> bool:
    if again:
        return False
    state = state_of(cell, out)
    if state.kind == "other":
        raise StudyError(
            f"{run_folder(cell, out)} holds a run with {state.why}: name another folder with "
            "--out, or run these cells anew with --again"
        )
    return state.finished


def _begin(
    cell: Cell, out: Path, slot: tuple[str, ...], beside: int, lock: int, parallel: int
) -> Going:
    folder = run_folder(cell, out)
    if folder.exists():  # begun and not ended, or to be done again
        shutil.rmtree(folder)
    log = _room(out, "logs") / f"{cell.name}.txt"
    with open(open_plain(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as printed:
        process = subprocess.Popen(
            command(cell, out),
            env=environment(slot, parallel),
            stdout=printed,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=(lock,),  # the lock lives as long as the cell does
        )
    return Going(cell, process, slot, time.monotonic(), beside, lock)


def _after(one: Going, out: Path, timeout_s: float) -> str | None:
    """Record how a cell ended; say why it has no result."""
    state, code = state_of(one.cell, out), one.process.returncode
    log = out / "logs" / f"{one.cell.name}.txt"
    said = read_plain(log).decode("utf-8", "replace").strip()[-LAST_WORDS:]
    why = None
    if not state.finished:
        ended = (
            f"it took longer than {timeout_s:g} s"
            if one.told and one.seconds > timeout_s
            else f"exit code {code}"
        )
        ended = "ended: no time was left" if one.told and one.seconds <= timeout_s else ended
        why = f"failed ({ended}): {' '.join(said.split())[-300:]}"
    line = {
        "cell": one.cell.name,
        "state": state.kind,
        "exit_code": code,
        "seconds": round(one.seconds, 2),
        "beside": one.beside,
        "device": ",".join(one.slot) or "cpu",
        "said": None if state.finished else said,
    }
    with open(open_plain(out / ATTEMPTS, APPEND), "a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    # A study needs the records, and adapters of dozens of cells would fill a disk.
    if state.finished:
        shutil.rmtree(run_folder(one.cell, out) / "checkpoints", ignore_errors=True)
    return why


def _slots(cells: Sequence[Cell], parallel: int) -> list[tuple[str, ...]]:
    """List a set of devices for each parallel cell.

    () is the CPU.
    """
    ranks = max((cell.config.batch.ranks or 1 for cell in cells), default=1)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(place) for place in range(len(gpus_present()))]
    if visible is not None:
        names = [name for name in visible.split(",") if name] if names else []
    sets = [
        tuple(names[place : place + ranks])
        for place in range(0, len(names), ranks)
        if place + ranks <= len(names)
    ]
    if names and not sets:
        raise StudyError(
            f"batch.ranks = {ranks}, but {len(names)} GPUs are visible: ask for fewer ranks"
        )
    return [one for one in sets or [()] for _ in range(parallel)]


def first_slot() -> tuple[str, ...]:
    """A device for work that is no cell; () is the CPU."""
    return _slots((), 1)[0]


def _locked(cell: Cell, out: Path) -> int | None:
    """A descriptor that holds the cell's lock; None if another process does."""
    lock = open_plain(_room(out, "locks") / cell.name, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _room(out: Path, name: str) -> Path:
    """A folder of the study's, made where it is missing."""
    require_plain_folder(out / name)
    (out / name).mkdir(parents=True, exist_ok=True)
    return out / name


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
