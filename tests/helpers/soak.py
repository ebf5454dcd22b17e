"""Kill a run at many moments, resume, and compare the end.

    soak.py FOLDER MODEL ROWS [--every N] [--random N] [--launched N]

The end must be that of a run that nobody killed. Most runs are forks of this process, which has
done a whole run already: imports and model code are warm, and a kill costs about two seconds.
`--every N` takes each N-th call, `--random N` kills N times by the clock, `--launched N` kills N
times through the launcher, with two ranks. Prints the counts; ends with 1 where a run ended
otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import tqdm
from launching import LAUNCH, ROOT, TWO_CPUS, environment, ranks_of
from soak_disk import Kill, forked, words_of

import train_loop
from glassloop.record.jsonl import read_jsonl
from glassloop.saved.capsule import find_capsules, read_capsule
from glassloop.saved.checkpoint import last_checkpoint, read_state


def goes_on(words: list[str], folder: Path) -> list[str] | None:
    """Command that resumes what a kill has left, or None.

    None if the run is complete.
    """
    if not (folder / "config.yaml").exists():
        return [*words, f"run.name={folder.name}"]
    checkpoint, _ = last_checkpoint(folder)
    if checkpoint is None:
        return ["--resume", str(folder), "--at", "0"]
    done = (
        json.loads((folder / "plan.json").read_text())["updates"] == read_state(checkpoint).update
    )
    return None if done else ["--resume", str(folder)]


def end_of(folder: Path) -> dict[str, Any]:
    """What must not depend on kills.

    The last attempt at each update, and the last checkpoint.

    Raises:
        ValueError: where something is torn.
    """
    end: dict[str, Any] = {"plan": json.loads((folder / "plan.json").read_text())}
    for name in ("metrics", "rows", "evaluations", "probes"):
        lines = read_jsonl(folder / f"{name}.jsonl")
        last = Counter[int]()
        for line in lines:
            last[line["update"]] = max(last[line["update"]], line["attempt"])
        timed = ("seconds", "attempt", "base")  # base scores are measured once a process
        end[name] = [
            {
                key: value
                for key, value in line.items()
                if not key.endswith("_s") and key not in timed
            }
            for line in lines
            if line["attempt"] == last[line["update"]]
        ]
    checkpoint, notes = last_checkpoint(folder)
    assert checkpoint is not None, notes
    for path in sorted(checkpoint.iterdir()):
        if path.suffix == ".safetensors" or path.name.startswith(("rng_", "optimizer")):
            end[path.name] = path.read_bytes()
    state = read_state(checkpoint)
    end["state"] = (
        state.update,
        state.epoch,
        state.loss_scale,
        state.finite_updates,
        state.heldout_loss_nats,
        state.details,
    )
    for capsule in find_capsules(folder / "capsules"):
        read_capsule(capsule)
    return end


class Soak:
    """One reference and many killed runs.

    `wrong` lists those that came to another end.
    """

    def __init__(self, work: Path, words: list[str]) -> None:
        self.work, self.words, self.wrong = work, words, []
        self.kills: Counter[str] = Counter()
        self.log = work / "log.txt"

    def reference(self) -> int:
        """Run once here and once in a fork, which must be alike.

        Returns the calls of the fork.
        """
        assert train_loop.main([*self.words, "run.name=warm"]) == 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(
                number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            )
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)
        self.whole = end_of(self.work / "runs/warm")
        folder = self.work / "runs/whole"
        assert forked([*self.words, "run.name=whole"], self.log, self.work) == 0, (
            self.log.read_text()[-3000:]
        )
        self.compare(folder, "not killed")
        kinds = self.log.with_suffix(".calls").read_text().split("\n")
        self.writes = [place for place, kind in enumerate(kinds) if kind == "write"]
        return len(kinds)

    def compare(self, folder: Path, what: str) -> None:
        try:
            end = end_of(folder)
            different = [name for name in self.whole if end.get(name) != self.whole[name]]
        except (ValueError, OSError, AssertionError, KeyError) as error:
            different = [f"{type(error).__name__}: {error}"]
        if different:
            self.wrong.append(f"{what}: {'; '.join(different)} ({folder})")
        else:
            shutil.rmtree(folder)

    def at_call(self, kill: Kill) -> None:
        """Kill at one call, go on once, compare."""
        folder = self.work / f"runs/call{kill[0]}{'half' * kill[1]}"
        what = f"killed {'in' if kill[1] else 'before'} call {kill[0]}"
        code = forked([*self.words, f"run.name={folder.name}"], self.log, self.work, kill)
        if code is not None:
            self.wrong.append(f"{what}: ended by itself with exit code {code} ({self.log})")
            return
        self.kills["in a write" if kill[1] else "before a call"] += 1
        self.finish(folder, what)

    def finish(self, folder: Path, what: str) -> None:
        argv = goes_on(self.words, folder)
        if argv is not None and (code := forked(argv, self.log, self.work)) != 0:
            self.wrong.append(f"{what}: {' '.join(argv[:4])} ended with {code} ({self.log})")
            return
        self.compare(folder, what)

    def at_random(self, count: int, longest_s: float) -> None:
        """Kill by the clock until `count` kills are spent.

        Each run is resumed until it is done.
        """
        drawn, run = random.Random(11), 0
        while self.kills["by the clock"] < count:
            folder, run = self.work / f"runs/clock{run}", run + 1
            argv: list[str] | None = [*self.words, f"run.name={folder.name}"]
            while argv is not None and self.kills["by the clock"] < count:
                code = forked(argv, self.log, self.work, after_s=drawn.uniform(0, longest_s))
                self.kills["by the clock"] += code is None
                argv = goes_on(self.words, folder)
            self.finish(folder, f"run {run} killed by the clock")

    def launched(self, count: int) -> None:
        """Kill two launched ranks: all processes at once, or one rank."""
        words = words_of(self.words[0][9:], self.words[1][12:], self.work / "runs", updates=40)
        assert self.launch([*words, "run.name=two"]).wait() == 0, self.log.read_text()[-3000:]
        self.whole = end_of(self.work / "runs/two")
        drawn, run = random.Random(12), 0
        while self.kills["launched, two ranks"] < count:
            folder, run = self.work / f"runs/launched{run}", run + 1
            argv: list[str] | None = [*words, f"run.name={folder.name}"]
            while argv is not None:
                process, killed_one = self.launch(argv), False
                if self.kills["launched, two ranks"] < count:
                    time.sleep(drawn.uniform(3, 11))
                    ranks = ranks_of(process.pid)
                    victims = ranks[:1] if drawn.random() < 0.25 else [process.pid, *ranks]
                    killed_one = (
                        bool(ranks) and process.poll() is None and all(map(killed, victims))
                    )
                    self.kills["launched, two ranks"] += killed_one
                code = process.wait()
                if code != 0 and not killed_one:
                    self.wrong.append(
                        f"launched run {run}: {' '.join(argv[:4])} ended with {code} ({self.log})"
                    )
                    break
                argv = goes_on(words, folder)
            self.compare(folder, f"launched run {run}")

    def launch(self, argv: list[str]) -> subprocess.Popen[bytes]:
        command = [*LAUNCH, str(TWO_CPUS), str(ROOT / "train_loop.py"), *argv]
        with self.log.open("a") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment(), start_new_session=True, stdout=log, stderr=log
            )


def killed(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("model")
    parser.add_argument("rows")
    for name, usual in (("every", 1), ("random", 60), ("launched", 20)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    asked = parser.parse_args()
    tqdm.tqdm.monitor_interval = 0  # no thread that a fork would lose
    tqdm.tqdm.set_lock(
        threading.RLock()
    )  # its own one lies in memory that forks share: a killed one would keep it for ever
    os.environ.update(
        {
            "HF_DATASETS_CACHE": str(asked.folder / "datasets"),
            "GLASSLOOP_CACHE": str(asked.folder / "cache"),
        }
    )
    soak = Soak(
        asked.folder.resolve(), words_of(asked.model, asked.rows, asked.folder.resolve() / "runs")
    )
    began = time.monotonic()
    calls = soak.reference()
    one_run_s = time.monotonic() - began
    for place in range(0, calls, asked.every):
        soak.at_call((place, False))
    for place in soak.writes[:: asked.every]:
        soak.at_call((place, True))
    soak.at_random(asked.random, one_run_s / 3)
    if asked.launched:
        soak.launched(asked.launched)
    print(
        f"\na run makes {calls} calls that change the disk, {len(soak.writes)} of them writes",
        file=sys.stderr,
    )
    counts = ", ".join(f"{count} {how}" for how, count in soak.kills.items())
    print(
        f"kills: {soak.kills.total()} ({counts}); {len(soak.wrong)} came to another end",
        file=sys.stderr,
    )
    for line in soak.wrong:
        print(line, file=sys.stderr)
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
