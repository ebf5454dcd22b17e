"""Runs of train_loop.py through `accelerate launch`.

Started, followed by their records, ended, compared. No torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import signal
import statistics
import string
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glassloop.bench.workloads import workload
from glassloop.verify.processes import LAUNCHER_VARIABLES

ROOT = Path(__file__).resolve().parents[1]
# <s> <|user|> ... <|assistant|>: what the template of random: models puts around a prompt; behind
# the answer stands one more
BEGIN_TOKENS = 3
LAUNCH_FILES = {
    ("cuda", 2): "ddp_2gpu.yaml",
    ("cuda", 1): "single_gpu.yaml",
    ("cpu", 2): "cpu_2proc.yaml",
    ("cpu", 1): "cpu_2proc.yaml",
}


@dataclass(frozen=True)
class Place:
    """Where all parts run.

    device: cuda | cpu. work: folder for runs and logs. cards: CUDA_VISIBLE_DEVICES of two ranks (""
    on a CPU).
    """

    device: str
    model: str
    work: Path
    cards: tuple[str, ...]
    python: str = sys.executable

    @property
    def precision(self) -> str:
        return "bf16" if self.device == "cuda" else "fp32"

    def environment(self, ranks: int) -> dict[str, str]:
        """This process's environment for a command.

        Nobody else's launcher, the cards of `ranks` ranks, and this very glassloop.
        """
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in LAUNCHER_VARIABLES
            and not name.startswith(("ACCELERATE_", "TORCHELASTIC_"))
        }
        kept["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        if self.device == "cpu":
            return kept | {
                "CUDA_VISIBLE_DEVICES": "",
                "ACCELERATE_USE_CPU": "true",
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            }
        return kept | {"CUDA_VISIBLE_DEVICES": ",".join(self.cards[:ranks])}


def write_rows(path: Path, name: str, rows: int) -> list[int]:
    """Rows of letters, as long under the template and tokenizer of `random:` models as the
    workload's.

    Their lengths in tokens.
    """
    made = workload(name, rows, vocabulary=512)
    with open(path, "w", encoding="utf-8") as file:
        for index, row in enumerate(made):
            letters = random.Random(index).choices(
                string.ascii_lowercase, k=len(row) - BEGIN_TOKENS - 1
            )
            prompt = len(row) - row.supervised_tokens - BEGIN_TOKENS
            file.write(
                json.dumps(
                    {"prompt": "".join(letters[:prompt]), "completion": "".join(letters[prompt:])}
                )
                + "\n"
            )
    return [len(row) for row in made]


@dataclass
class Started:
    """A command that runs. began: time.monotonic()."""

    process: subprocess.Popen[bytes]
    log: Path
    began: float

    def wait(self, until: float) -> int | None:
        """Its exit code; None where it still runs at `until` (time.monotonic())."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(max(0.0, until - time.monotonic()))
        return None

    def reaches(self, there: Callable[[], bool], until: float) -> bool:
        """Wait until `there()`; False where it has ended before, or at `until`."""
        while not there():
            if self.process.poll() is not None or time.monotonic() > until:
                return there()
            time.sleep(0.05)
        return True

    @property
    def said(self) -> str:
        """The end of what it printed."""
        return self.log.read_text(encoding="utf-8", errors="replace").strip()[-1500:]


def json_in(log: Path) -> dict[str, Any]:
    """The object that a command with --json printed among other lines.

    Raises ValueError without one.
    """
    text = log.read_text(encoding="utf-8", errors="replace")
    start = 0 if text.startswith("{") else text.find("\n{") + 1
    return json.JSONDecoder().raw_decode(text, start)[0]


RUNNING: list[Started] = []  # what is ended when this process ends


def start(
    place: Place,
    words: Sequence[str],
    name: str,
    ranks: int,
    variables: Mapping[str, str] | None = None,
) -> Started:
    """Start a command in the repository's root; its output goes to work/NAME.log."""
    log = place.work / f"{name}.log"
    with open(log, "ab") as out:
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env={**place.environment(ranks), **(variables or {})},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    RUNNING.append(one := Started(process, log, time.monotonic()))
    return one


def launched(place: Place, words: Sequence[str], ranks: int) -> list[str]:
    """`accelerate launch --config_file accelerate_configs/... WORDS`."""
    file = ROOT / "accelerate_configs" / LAUNCH_FILES[place.device, ranks]
    launcher = [place.python, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    return [*launcher, "--num_processes", str(ranks), *words]


def train(place: Place, name: str, words: Sequence[str], *, ranks: int = 2) -> Started:
    """Start train_loop.py through accelerate launch."""
    return start(place, launched(place, ["train_loop.py", *words], ranks), name, ranks)


def recipe(place: Place, name: str, *words: str) -> list[str]:
    """The recipe on the made rows, with the reference engine unless words name another.

    What differs from `r1_8b_scam` is where weights and rows
    come from, and that nothing is generated."""
    return [
        "r1_8b_scam", f"model.id={place.model}", f"data.source={place.work / 'rows.jsonl'}",
        "data.format=prompt_completion", "data.template=chat", "data.heldout=null",
        "data.heldout_rows=null", "evaluation.samples=0", "tracking.to=[]",
        "execution.engine=peft", f"execution.precision={place.precision}",
        "execution.collective_timeout_s=300", f"run.dir={place.work / 'runs'}", f"run.name={name}",
        *words,
    ]  # fmt: skip


def tree(pid: int) -> dict[int, str]:
    """The process and all that it has started, with the tick at which each began (so that a number
    used anew is not taken for it).
    """
    parents: dict[int, tuple[int, str]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = stat.read_text().rpartition(")")[2].split()
            parents[int(stat.parent.name)] = (int(fields[1]), fields[19])
    found: dict[int, str] = {}
    new = {pid} & parents.keys()
    while new:
        found |= {one: parents[one][1] for one in new}
        new = {one for one, (parent, _) in parents.items() if parent in found and one not in found}
    return found


def end(one: Started, patience_s: float = 15.0) -> None:
    """Ask the command to end, and after `patience_s` kill it and all that it had started."""
    began = tree(one.process.pid)
    if one.process.poll() is None:
        one.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            one.process.wait(patience_s)
    kill(began)
    one.process.wait()
    if one in RUNNING:
        RUNNING.remove(one)


def kill(processes: dict[int, str]) -> None:
    """Kill what still runs of a `tree`."""
    for pid, tick in processes.items():
        if tree(pid).get(pid) == tick:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def lines_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """Whole lines of a run's file; none where it is not there yet."""
    try:
        text = (folder / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.split("\n")[:-1]]


def updates_of(folder: Path) -> dict[int, dict[str, Any]]:
    """Update -> its record, of the last attempt."""
    return {line["update"]: line for line in lines_of(folder, "metrics.jsonl")}


def rows_of(folder: Path) -> dict[int, list[str]]:
    """Update -> ids of its rows, sorted."""
    found: dict[int, set[str]] = {}
    for line in lines_of(folder, "rows.jsonl"):
        found.setdefault(line["update"], set()).add(line["row_id"])
    return {update: sorted(rows) for update, rows in found.items()}


def checkpoint_names(folder: Path) -> list[str]:
    """Names of a run's complete checkpoints, the oldest first."""
    found = (folder / "checkpoints").glob("update_*")
    return sorted(path.name for path in found if path.is_dir())


def checkpoint(folder: Path) -> tuple[str, str] | None:
    """Name of the newest complete checkpoint and a digest of its files.

    None where there is none.
    """
    if not (names := checkpoint_names(folder)):
        return None
    digest = hashlib.sha256()
    for file in sorted((folder / "checkpoints" / names[-1]).rglob("*")):
        if file.is_file():
            digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return names[-1], digest.hexdigest()


def speed(updates: dict[int, dict[str, Any]], skip: int = 2) -> dict[str, Any]:
    """Of the updates after the first `skip`.

    Seconds, tokens, and what communication took of them on rank 0.

    reduce: summing gradients over ranks and taking the norm. waiting: for the slower rank's passes
    and the exchange of reports.
    """
    lines = [line for update, line in sorted(updates.items()) if update > skip]
    if not lines:
        return {"updates_timed": 0}
    total = sum(line["update_s"] for line in lines)
    waiting = [line["compute_s"] - line["rank_passes_s"][0] for line in lines]
    return {
        "updates_timed": len(lines),
        "update_s_median": statistics.median(line["update_s"] for line in lines),
        "real_tokens_per_s": sum(sum(line["rank_real_tokens"]) for line in lines) / total,
        "reduce_s_median": statistics.median(line["reduce_s"] for line in lines),
        "reduce_share": sum(line["reduce_s"] for line in lines) / total,
        "waiting_s_median": statistics.median(waiting),
        "waiting_share": sum(waiting) / total,
        "peak_gib": max(lines[-1]["rank_peak_gib"]) if lines[-1]["rank_peak_gib"] else None,
    }


def apart(
    ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]], name: str
) -> dict[int, float]:
    """Update -> |ours / theirs - 1| of the record's field `name`.

    Infinite where one has no such number.
    """
    found = {}
    for update in sorted(ours.keys() & theirs.keys()):
        a, b = ours[update][name], theirs[update][name]
        sound = isinstance(a, int | float) and isinstance(b, int | float) and math.isfinite(a) and b
        found[update] = abs(a / b - 1) if sound else math.inf
    return found
