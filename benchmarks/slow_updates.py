"""How often the detector of slow updates is wrong, and how often it sees and names a cause.

    PYTHONPATH=. python benchmarks/slow_updates.py [--updates 600] [--out FILE]

Two kinds of evidence. `drawn` are series of known scatter, with a cause planted into one update.
`loop` is the real loop on this CPU (a tiny Llama, ragged rows) and the real sampler: processes that
take its cores, and a file read past the page cache, are real; a hot, shared or idle card is told by
a stand-in for NVML while the update sleeps. An alarm where nothing was planted is a false one,
unless it is `host` or `disk`: other work on this machine does just that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

from clean_runs import make_base, write_short_rows
from fake_nvml import FakeNvml
from slow_drawn import NAMED, PLANTED, Drawn, clean, hits

from glassloop.config.arguments import from_values
from glassloop.disk.environment import environment
from glassloop.health import slowness
from glassloop.health.machine import Sampler
from glassloop.health.nvml import NvmlCard
from glassloop.loop.build import build_run
from train_loop import update_once

ROOT = Path(__file__).resolve().parents[1]
SIGMAS = (0.01, 0.05, 0.1, 0.2)
TIMES = (1.3, 1.6, 2.0, 4.0)
EVERY = 12  # updates from one planted cause to the next
SLEEP_S = 1.5  # of an update whose card is told to be slow, in usual updates
FILE_MIB = 256
USUAL = {"sm": 1980, "throttle": 0, "processes": [1], "busy": 95}
TOLD = {  # what the stand-in says of the card meanwhile
    "throttled": {"sm": 900, "throttle": 0x20},
    "shared card": {"processes": [1, 2]},
    "idle card": {"busy": 20},
}


class Loop:
    """A real run with causes to plant.

    Args:
        folder: for its files.
    """

    def __init__(self, folder: Path, updates: int) -> None:
        os.environ["GLASSLOOP_CACHE"] = str(folder / "cache")
        make_base(folder / "base", 0)
        write_short_rows(folder / "rows.jsonl", 600)
        data = {"source": str(folder / "rows.jsonl"), "template": "chat", "max_tokens": 256}
        self.run = build_run(
            from_values(
                {
                    "model": {"id": str(folder / "base"), "quantization": "none"},
                    "data": data,
                    "batch": {"size": 2, "accumulation": 8},
                    "schedule": {"updates": updates, "warmup_updates": 5},
                    "execution": {"engine": "peft", "precision": "fp32", "checkpointing": False},
                    "evaluation": {"samples": 0},
                    "record": {"capsules": 0, "probe_every_updates": None},
                    "run": {"dir": str(folder / "runs"), "name": "loop"},
                }
            )
        )
        self.nvml, self.taken = FakeNvml(**USUAL), 0.0
        self.run.machine = Sampler(
            NvmlCard(self.nvml, "GPU-a"), 0.05, allocations=lambda: self.taken
        )
        self.file = folder / "large"
        self.file.write_bytes(os.urandom(2**20) * FILE_MIB)
        os.sync()
        self.usual_s, self._before = 0.0, lambda: None
        engine = self.run.replica.engine

        def call(p: Any) -> Any:
            self._before()
            self._before = lambda: None
            return engine(p)

        self.run.replica.engine = call

    def do(self, u: int, cause: str | None) -> slowness.Slow | None:
        """Update u under a cause; what the detector says of it."""
        with PLANTS[cause](self) if cause in PLANTS else told(self, cause):
            outcome = update_once(self.run, u)
        assert outcome is not None
        if cause is None:
            self.usual_s = outcome.record.update_s
        return self.run.slowness.look(outcome.record, outcome.machine)

    def sleep(self) -> None:
        time.sleep(SLEEP_S * self.usual_s)

    def read(self) -> None:
        """Read a file that is not in the page cache, until the update is late."""
        until = time.monotonic() + SLEEP_S * self.usual_s
        while True:
            with self.file.open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while file.read(2**22):
                    pass
            if time.monotonic() > until:
                return


@contextlib.contextmanager
def told(loop: Loop, cause: str | None) -> Iterator[None]:
    """The stand-in speaks of a slow card, and the update sleeps."""
    if cause is not None:
        loop.nvml.values |= TOLD[cause]
        loop._before = loop.sleep
    yield
    loop.nvml.values |= USUAL


@contextlib.contextmanager
def allocator(loop: Loop) -> Iterator[None]:
    """CUDA is asked for memory, which takes its time."""

    def take() -> None:
        loop.taken += 40
        loop.sleep()

    loop._before = take
    yield


@contextlib.contextmanager
def disk(loop: Loop) -> Iterator[None]:
    loop._before = loop.read
    yield


@contextlib.contextmanager
def taken_cores(_: Loop) -> Iterator[None]:
    """Processes that want this machine's cores, four for each."""
    count = 4 * len(os.sched_getaffinity(0))
    words = [sys.executable, "-S", "-c", "while True: pass"]
    started = [subprocess.Popen(words) for _ in range(count)]
    try:
        yield
    finally:
        for one in started:
            one.send_signal(signal.SIGKILL)
            one.wait()


PLANTS: dict[str | None, Callable[[Loop], Any]] = {
    "allocator": allocator,
    "disk": disk,
    "taken cores": taken_cores,
}


def in_the_loop(updates: int) -> dict[str, Any]:
    """False alarms and hits of a real run."""
    causes = [*TOLD, *PLANTS]
    planted: dict[str, list[slowness.Slow | None]] = {str(cause): [] for cause in causes}
    alarms: Counter[str] = Counter()
    sound = 0
    with tempfile.TemporaryDirectory(prefix="glassloop-slow-") as folder:
        loop = Loop(Path(folder), updates)
        loop.run.machine.start()
        for u in range(1, updates + 1):
            cause = causes[u // EVERY % len(causes)] if u % EVERY == 0 and u > EVERY else None
            found = loop.do(u, cause)
            if cause is not None:
                planted[str(cause)].append(found)
                continue
            sound += 1
            alarms[found.cause if found else "none"] += 1
        loop.run.machine.close()
        loop.run.close_observers()
    del alarms["none"]
    return {
        "sound_updates": sound,
        "alarms_on_them": dict(alarms),
        "planted": {
            cause: {
                "planted": len(found),
                "seen": sum(one is not None for one in found),
                "named": sum(
                    one is not None and one.cause == NAMED.get(cause, cause) for one in found
                ),
                "times_as_long": [
                    round(one.took_s / one.expected_s, 2) for one in found if one is not None
                ],
                "other_names": dict(
                    Counter(one.cause for one in found if one)
                    - Counter({NAMED.get(cause, cause): len(found)})
                ),
            }
            for cause, found in planted.items()
        },
    }


def in_drawn_series(runs: int) -> dict[str, Any]:
    """False alarms and hits on series of known scatter."""
    return {
        "clean": [
            clean(Drawn(ranks, sigma, ragged), runs, 300)
            for ranks in (1, 2)
            for sigma in SIGMAS
            for ragged in (1.0, 3.0)
        ],
        "planted": [
            hits(Drawn(ranks, sigma, ragged), cause, factor, runs)
            for cause in PLANTED
            for ranks in (1, 2)
            if ranks == 2 or cause not in ("rank", "reduction")
            for sigma, ragged in ((0.05, 1.0), (0.05, 3.0))
            for factor in TIMES
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--updates", type=int, default=600, help="of the real run; 0: none")
    parser.add_argument("--drawn", type=int, default=100, help="series of each kind")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/slow-updates.json")
    asked = parser.parse_args()
    where, load = environment(["slow_updates.py"]), os.getloadavg()[0]
    result: dict[str, Any] = {
        "schema": 1,
        "what": "slow_updates",
        "machine": {
            "system": where["system"],
            "cores": len(os.sched_getaffinity(0)),
            "gpus": where["gpus"],
            "load_1_min_before": load,
        },
        "environment": where,
        "constants": {
            name: value
            for name, value in vars(slowness).items()
            if name.isupper() and isinstance(value, int | float)
        },
        "drawn": in_drawn_series(asked.drawn),
        "loop": in_the_loop(asked.updates) if asked.updates else None,
    }
    result["machine"]["load_1_min_after"] = os.getloadavg()[0]
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["loop"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
