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
            line = spec.about | {"failed": why, "left_out": True}
        else:
            line = run_arm(spec, place, folder / f"arm-{number}", python=pythons.get(spec.engine, sys.executable))
        line["check"] = checked(line, lines)
        lines.append(line)
        append(out, line)
        say(f"[{number}/{len(order)}] {spec.name}: {told(line)} ({time.monotonic() - began:.0f} s)")
    return lines


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
    folder.mkdir(parents=True)
    return run_command(spec, command(spec, folder, python), place, folder, timeout_s)


def run_command(spec: Spec, words: Sequence[str], place: Place, folder: Path, timeout_s: float) -> dict[str, Any]:
    """A command that reads folder/spec.json and adds a line to the spec's `out`; it is ended after `timeout_s`."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = replace(spec, launched_at=time.time(), out=str(folder / "line.jsonl"))
    spec.write(folder / "spec.json")
    with open(folder / "errors.txt", "w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            words,
            env=environment(spec, place),
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
        try:
            why = f"it ended with exit code {process.wait(timeout_s)}"
        except subprocess.TimeoutExpired:
            why = f"it took longer than {timeout_s:g} s"
        finally:
            _end(process)
    written = Path(spec.out)
    if written.exists():
        return json.loads(written.read_text(encoding="utf-8").splitlines()[-1])
    said = (folder / "errors.txt").read_text(encoding="utf-8", errors="replace").strip()[-600:]
    return spec.about | {"failed": f"{why}: {said}"}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the arm and whatever it has started."""
    try:
        os.killpg(process.pid, signal.SIGTERM if process.poll() is None else signal.SIGKILL)
    except ProcessLookupError:
        return
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


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
