"""Processes of a benchmark's arms: started alone or together, watched, ended.

No torch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import glassloop
from glassloop.bench.clock import POLL_S, go, ready
from glassloop.bench.spec import Spec
from glassloop.verify.processes import LAUNCHER_VARIABLES, launch_file

ARM_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Place:
    """The place of arms: cuda or cpu, and the visible cards."""

    device: str
    gpus: int

    def backend(self, ranks: int) -> str:
        """NCCL refuses two ranks on one card; gloo does not."""
        return "gloo" if self.device == "cuda" and ranks > self.gpus else "auto"


def run_arm(
    spec: Spec,
    place: Place,
    folder: Path,
    timeout_s: float = ARM_TIMEOUT_S,
    python: str = sys.executable,
) -> dict[str, Any]:
    """Run one arm in fresh processes; return its line."""
    return run_command(Start.of_ours(spec, folder, python), place, timeout_s)


@dataclass(frozen=True)
class Start:
    """An arm and the command of its process.

    The command reads folder/spec.json and adds a line to the spec's `out`.
    """

    spec: Spec
    words: Sequence[str]
    folder: Path

    @classmethod
    def of_ours(cls, spec: Spec, folder: Path, python: str = sys.executable) -> Start:
        """An arm of glassloop itself."""
        folder.mkdir(parents=True)
        return cls(spec, command(spec, folder, python), folder)


def run_command(start: Start, place: Place, timeout_s: float) -> dict[str, Any]:
    """An arm alone; it is ended after `timeout_s`."""
    one = _Running(start, place)
    try:
        one.wait(timeout_s)
    finally:
        one.end()
    return one.line()


def run_together(
    starts: Sequence[Start], place: Place, timeout_s: float, *, first_alone: bool = False
) -> list[dict[str, Any]]:
    """Run arms that take turns (Spec.turns), all loaded at once.

    Each round begins with another arm. Returns one line each, in the order of `starts`.

    Args:
        timeout_s: longest time of loading, and of a turn; an arm that takes longer is ended, and
            the others continue.
        first_alone: the first is loaded before the others are started, so that they find in the
            cache what it puts there.
    """
    running: list[_Running] = []
    try:
        for start in starts:
            running.append(_Running(start, place))
            if first_alone and len(running) == 1:
                running[0].await_file(ready(running[0].folder, 0), timeout_s)
        for one in running:
            one.await_file(ready(one.folder, 0), timeout_s)
        for turn in range(max(start.spec.turns for start in starts)):
            for number in range(len(running)):
                one = running[(number + turn) % len(running)]
                if one.alive and turn < one.spec.turns:
                    go(one.folder, turn).touch()
                    if turn + 1 < one.spec.turns:
                        one.await_file(ready(one.folder, turn + 1), timeout_s)
                    else:
                        one.wait(timeout_s)
                        one.end()
    finally:
        for one in running:
            one.end()
    return [one.line() for one in running]


class _Running:
    """An arm's process."""

    def __init__(self, start: Start, place: Place):
        self.folder, self.why = start.folder, ""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.spec = replace(
            start.spec, launched_at=time.time(), out=str(self.folder / "line.jsonl")
        )
        self.spec.write(self.folder / "spec.json")
        with open(self.folder / "errors.txt", "w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                start.words,
                env=environment(self.spec, place),
                cwd=self.folder,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def wait(self, timeout_s: float) -> None:
        """Until it has ended by itself; or end it."""
        try:
            self.why = f"it ended with exit code {self.process.wait(timeout_s)}"
        except subprocess.TimeoutExpired:
            self._too_long(timeout_s)

    def await_file(self, file: Path, timeout_s: float) -> None:
        """Until the arm has made `file`; at once where it has ended.

        It is ended after `timeout_s`.
        """
        until = time.monotonic() + timeout_s
        while self.alive and not file.exists():
            if time.monotonic() > until:
                return self._too_long(timeout_s)
            time.sleep(POLL_S)
        if not self.alive:
            self.why = self.why or f"it ended with exit code {self.process.returncode}"
        return None

    def _too_long(self, timeout_s: float) -> None:
        self.why = f"it took longer than {timeout_s:g} s"
        self.end()

    def end(self) -> None:
        """End the arm and whatever it has started."""
        try:
            os.killpg(self.process.pid, signal.SIGTERM if self.alive else signal.SIGKILL)
        except ProcessLookupError:
            return
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def line(self) -> dict[str, Any]:
        """Read the line that it wrote, or say why it wrote none."""
        written = Path(self.spec.out)
        if written.exists():
            return json.loads(written.read_text(encoding="utf-8").splitlines()[-1])
        said = (
            (self.folder / "errors.txt")
            .read_text(encoding="utf-8", errors="replace")
            .strip()[-600:]
        )
        return self.spec.about | {"failed": f"{self.why}: {said}"}


def command(spec: Spec, folder: Path, python: str = sys.executable) -> list[str]:
    """Build the command of the arm's process."""
    module = ["glassloop.bench.arm", str(folder / "spec.json")]
    if spec.ranks == 1:
        return [python, "-m", *module]
    file = folder / "launch.yaml"
    file.write_text(launch_file(spec.device), encoding="utf-8")
    launcher = [python, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    return [*launcher, "--num_processes", str(spec.ranks), "--module", *module]


def environment(spec: Spec, place: Place) -> dict[str, str]:
    """Build an arm's environment: its cards, this glassloop, no other launcher."""
    left_out = (*LAUNCHER_VARIABLES, "ACCELERATE_MIXED_PRECISION")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in left_out and not name.startswith("TORCHELASTIC_")
    }
    here = str(Path(glassloop.__file__).resolve().parents[1])
    kept |= {
        "PYTHONPATH": os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if spec.device == "cpu":
        threads = os.environ.get("OMP_NUM_THREADS") or str(
            max(1, (os.cpu_count() or 1) // spec.ranks)
        )
        return kept | {
            "CUDA_VISIBLE_DEVICES": "",
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": threads,
        }
    visible = (
        os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(place.gpus)))
    ).split(",")
    kept["CUDA_VISIBLE_DEVICES"] = ",".join(visible[: spec.ranks])
    if spec.ranks > place.gpus:
        kept["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"  # or DDP is told that rank r has GPU r
    return kept
