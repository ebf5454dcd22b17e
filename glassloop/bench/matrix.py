"""The benchmark's matrix: which arms there are, in what order, and each in a fresh process. No torch."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import glassloop
from glassloop.bench.clock import POLL_S, go, ready
from glassloop.bench.results import REFERENCE_ENGINE, SAME_WORK, append, checked, is_reference
from glassloop.bench.spec import Spec
from glassloop.unsloth_checks import problems
from glassloop.verify.processes import LAUNCHER_VARIABLES, launch_file

ARM_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Place:
    """Where arms run: cuda or cpu, and how many cards are visible."""

    device: str
    gpus: int

    def backend(self, ranks: int) -> str:
        """NCCL refuses two ranks on one card; gloo does not."""
        return "gloo" if self.device == "cuda" and ranks > self.gpus else "auto"


def specs_of(
    *,
    engines: Sequence[str],
    workloads: Sequence[str],
    layouts: Sequence[str],
    ranks: Sequence[int],
    batches: Sequence[int],
    checkpointing: Sequence[bool],
    place: Place,
    common: dict[str, Any],
    varied: Sequence[tuple[str, ...]] = ((),),
) -> list[Spec]:
    """Every combination, once. `common`: further fields of all specs. `varied`: see Spec; fields of memory are for fused alone."""
    combinations = itertools.product(workloads, engines, varied, layouts, batches, checkpointing, ranks)
    specs = (
        Spec(
            engine=engine,
            workload=workload,
            layout=layout,
            ranks=count,
            batch=batch,
            checkpointing=recompute,
            device=place.device,
            backend=place.backend(count),
            varied=tuple(field for field in fields if engine == "fused" or not field.startswith("memory.")),
            **common,
        )
        for workload, engine, fields, layout, batch, recompute, count in combinations
    )
    return list(dict.fromkeys(specs))


def schedule(specs: Sequence[Spec], repeats: int) -> list[Spec]:
    """What is run, in order: references first, then the arms in turn, each repeat beginning with another one.

    Where no arm is the reference of some others (the reference engine, literal, one rank), a short one is put before them: it serves their check.
    """
    first: list[Spec] = []
    for spec in specs:
        if not any(is_reference(one.cell) and _same_work(one, spec) for one in [*specs, *first]):
            own = dict(
                engine=REFERENCE_ENGINE,
                layout="literal",
                ranks=1,
                backend="auto",
                updates=1,
                warmup=1,
                varied=(),
                check_only=True,
            )
            first.append(replace(spec, **own))
    arms = sorted(specs, key=lambda spec: not is_reference(spec.cell))  # stable: references lead in the first repeat
    turns = [
        replace(arms[(place + repeat) % len(arms)], repeat=repeat) for repeat in range(repeats) for place in range(len(arms))
    ]
    return [*first, *turns]


def _same_work(one: Spec, other: Spec) -> bool:
    return all(one.cell[name] == other.cell[name] for name in SAME_WORK)


def unable(spec: Spec, pythons: Mapping[str, str]) -> str | None:
    """Why an arm is not even started here; None where it is. `pythons`: see run_matrix."""
    if spec.engine == "unsloth" and spec.engine not in pythons and (found := problems(on_cuda=spec.device == "cuda")):
        return "; ".join(found)
    return None


def run_matrix(
    order: Sequence[Spec], place: Place, folder: Path, out: Path, say: Callable[[str], None], pythons: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Run every spec; each line goes to `out` as soon as it is there, with its check. Returns the lines.

    Args:
        pythons: engine -> the interpreter of its arms, where that is not this one.
    """
    lines: list[dict[str, Any]] = []
    for number, spec in enumerate(order, start=1):
        began = time.monotonic()
        if why := unable(spec, pythons):
            line = left_out(spec, why)
        else:
            line = run_arm(spec, place, folder / f"arm-{number}", python=pythons.get(spec.engine, sys.executable))
        keep(line, lines, out)
        say(f"[{number}/{len(order)}] {spec.name}: {told(line)} ({time.monotonic() - began:.0f} s)")
    return lines


def run_groups(
    groups: Sequence[Sequence[Start]],
    place: Place,
    out: Path,
    say: Callable[[str], None],
    known: Sequence[dict[str, Any]] = (),
    *,
    timeout_s: float = ARM_TIMEOUT_S,
    first_alone: bool = False,
) -> list[dict[str, Any]]:
    """Groups of arms that take turns, one group after the other; lines and `out` as with run_matrix.

    Args:
        known: lines that may hold a group's reference. timeout_s, first_alone: see run_together.
    """
    lines: list[dict[str, Any]] = []
    for number, starts in enumerate(groups, start=1):
        began = time.monotonic()
        found = run_together(starts, place, timeout_s, first_alone=first_alone)
        for line in sorted(found, key=lambda line: not is_reference(line["cell"])):
            keep(line, lines, out, known)
            say(f"[group {number}/{len(groups)}] {line['name']}: {told(line)}")
        say(f"[group {number}/{len(groups)}] {time.monotonic() - began:.0f} s")
    return lines


def run_in_turns(
    order: Sequence[Spec], place: Place, folder: Path, out: Path, say: Callable[[str], None], pythons: Mapping[str, str]
) -> list[dict[str, Any]]:
    """As run_matrix, with all arms of a workload loaded at once and taking turns; those that only serve a check take one."""
    lines: list[dict[str, Any]] = []
    groups: dict[str, list[Start]] = {}
    for number, spec in enumerate(order, start=1):
        if why := unable(spec, pythons):
            keep(left_out(spec, why), lines, out)
            say(f"{spec.name}: {told(lines[-1])}")
            continue
        python = pythons.get(spec.engine, sys.executable)
        turns = 1 if spec.check_only else spec.turns
        group = groups.setdefault(spec.workload, [])
        group.append(Start.of_ours(replace(spec, turns=turns), folder / f"arm-{number}", python))
    return lines + run_groups(list(groups.values()), place, out, say, first_alone=True)


def left_out(spec: Spec, why: str) -> dict[str, Any]:
    """The line of an arm that is not started."""
    return spec.about | {"failed": why, "left_out": True}


def keep(line: dict[str, Any], lines: list[dict[str, Any]], out: Path, known: Sequence[dict[str, Any]] = ()) -> None:
    """Add a line with its check to `lines` and to the file."""
    line["check"] = checked(line, [*known, *lines])
    lines.append(line)
    append(out, line)


def told(line: dict[str, Any]) -> str:
    """A line in a few words."""
    if "failed" in line:
        return f"{'left out' if line.get('left_out') else 'failed'}: {line['failed']}"
    check, speed = line["check"], f"{line['tokens_per_s']['real']:,.0f} real tokens/s"
    if check["within"]:
        return speed
    if check["within"] is None:
        return f"not shown: {check['why']}"
    return f"CHECK FAILED: loss off by {check['loss_off']}, norm by {check['norm_off']} (at most {check['tolerance']})"


def run_arm(
    spec: Spec, place: Place, folder: Path, timeout_s: float = ARM_TIMEOUT_S, python: str = sys.executable
) -> dict[str, Any]:
    """One arm of glassloop in a fresh process (or `ranks` of them): its line, or one that says why there is none."""
    return run_command(Start.of_ours(spec, folder, python), place, timeout_s)


@dataclass(frozen=True)
class Start:
    """An arm and how its process is started: a command that reads folder/spec.json and adds a line to the spec's `out`."""

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


def run_together(starts: Sequence[Start], place: Place, timeout_s: float, *, first_alone: bool = False) -> list[dict[str, Any]]:
    """Arms that take turns (Spec.turns), all loaded at once; each round begins with another one. One line each, in the order of `starts`.

    Args:
        timeout_s: longest time of loading, and of a turn; an arm that takes longer is ended, and the others go on.
        first_alone: the first is loaded before the others are started, so that they find in the cache what it puts there.
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
        self.spec = replace(start.spec, launched_at=time.time(), out=str(self.folder / "line.jsonl"))
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
        """Until the arm has made `file`; at once where it has ended. It is ended after `timeout_s`."""
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
        """What it wrote, or why it wrote nothing."""
        written = Path(self.spec.out)
        if written.exists():
            return json.loads(written.read_text(encoding="utf-8").splitlines()[-1])
        said = (self.folder / "errors.txt").read_text(encoding="utf-8", errors="replace").strip()[-600:]
        return self.spec.about | {"failed": f"{self.why}: {said}"}


def command(spec: Spec, folder: Path, python: str = sys.executable) -> list[str]:
    """How the arm's process is started."""
    module = ["glassloop.bench.arm", str(folder / "spec.json")]
    if spec.ranks == 1:
        return [python, "-m", *module]
    file = folder / "launch.yaml"
    file.write_text(launch_file(spec.device), encoding="utf-8")
    launcher = [python, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    return [*launcher, "--num_processes", str(spec.ranks), "--module", *module]


def environment(spec: Spec, place: Place) -> dict[str, str]:
    """This process's environment for an arm: no other launcher's variables, the cards it may use, and this very glassloop."""
    left_out = (*LAUNCHER_VARIABLES, "ACCELERATE_MIXED_PRECISION")
    kept = {name: value for name, value in os.environ.items() if name not in left_out and not name.startswith("TORCHELASTIC_")}
    here = str(Path(glassloop.__file__).resolve().parents[1])
    kept |= {
        "PYTHONPATH": os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if spec.device == "cpu":
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // spec.ranks))
        return kept | {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": threads}
    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(place.gpus)))).split(",")
    kept["CUDA_VISIBLE_DEVICES"] = ",".join(visible[: spec.ranks])
    if spec.ranks > place.gpus:
        kept["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"  # or DDP is told that rank r has GPU r
    return kept
