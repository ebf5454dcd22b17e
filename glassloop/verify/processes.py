"""Processes of `glassloop verify`: one, and two by `accelerate launch`, watched.

Nothing here imports torch: what watches must live when what it watches does not.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import glassloop

MARK = "@verify "  # begins a line by which a worker says what it does
LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
STUCK = "stuck_"  # begins the name of a file in which a worker notes where it has been for long
SAY_EVERY_S = 4.0
WORKER = "glassloop.verify.worker"


def say_progress(text: str) -> None:
    """Tell the watching process that a worker lives, and what comes next.

    An empty text is nothing new.
    """
    # One write, so that lines of two processes stay apart.
    os.write(1, f"{MARK}{os.getpid()} {text}\n".encode())


class PartFailed(RuntimeError):
    """A part died or fell silent; names it and its last words."""


MOST_STACK_LINES = 40
RAISED = re.compile(r"(\[rank\d+\]: *)?(\w+\.)*\w*(Error|Exception|Broken|Interrupt)\b.*:")


@dataclass(frozen=True)
class Part:
    """A command to watch."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str]


def parts(folder: Path, device: str, gpus: int) -> list[Part]:
    """The two parts on `device` = cpu | cuda.

    With `gpus` = 1 both ranks of the second share it (over gloo).
    """
    (folder / "launch.yaml").write_text(launch_file(device))
    launcher = (
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(folder / "launch.yaml"),
        "--module",
    )
    ours = environment(folder)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(max(gpus, 1))))
    if device == "cpu":
        alone = both = ours | {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    else:
        alone = ours | {"CUDA_VISIBLE_DEVICES": visible.split(",")[0]}
        both = ours | {"CUDA_VISIBLE_DEVICES": ",".join(visible.split(",")[:2])}
    if gpus == 1:
        # Or DDP is told that rank r has GPU r.
        both = both | {"ACCELERATE_BYPASS_DEVICE_MAP": "true"}
    return [
        Part("one process", (sys.executable, "-m", WORKER, str(folder)), alone),
        Part("two processes", (*launcher, WORKER, str(folder)), both),
    ]


def launch_file(device: str) -> str:
    """Text of accelerate_configs/cpu_2proc.yaml and ddp_2gpu.yaml, for a wheel."""
    cpu = device == "cpu"
    lines = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU",  # how Accelerate spells "several ranks", also on a CPU
        "use_cpu": "true" if cpu else "false",
        "gpu_ids": "'-1,-1'" if cpu else "all",
        "num_machines": "1",
        "machine_rank": "0",
        "num_processes": "2",
        "main_process_port": "0",
        "mixed_precision": "'no'",
    }
    return "".join(f"{key}: {value}\n" for key, value in lines.items())


def environment(folder: Path) -> dict[str, str]:
    """Build a worker's environment: offline, one thread, caches in `folder`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith(("ACCELERATE_", "TORCHELASTIC_"))
    }
    here = str(Path(glassloop.__file__).resolve().parents[1])
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "GLASSLOOP_CACHE": str(folder / "cache"),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",  # the model is too small for more
        "NVIDIA_TF32_OVERRIDE": "0",  # a user's 1 would make fp32 mean 10 bits
        "PYTHONPATH": os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


def run_parts(
    chosen: Sequence[Part], *, patience_s: float, say: Callable[[str], None], cwd: Path
) -> None:
    """Run all parts at once and wait for them.

    Args:
        patience_s: longest time without a line from a part, in seconds.
        say: gets a progress line now and then.
        cwd: the parts' working folder.

    Raises:
        PartFailed: when a part ends with another exit code than 0, or says nothing for
            `patience_s`; all processes are ended then.
    """
    watched: list[Watched] = []
    lines: queue.Queue[tuple[Watched, str]] = queue.Queue()
    try:
        for part in chosen:
            watched.append(Watched(part, cwd))
            threading.Thread(target=watched[-1].read_into, args=(lines,), daemon=True).start()
        living, said = list(watched), time.monotonic()
        while living:
            with contextlib.suppress(queue.Empty):
                one, line = lines.get(timeout=0.5)
                if one.take(line) and time.monotonic() - said >= SAY_EVERY_S:
                    said = time.monotonic()
                    say("; ".join(f"{w.part.name} {w.doing}" for w in living))
            for one in [w for w in living if w.process.poll() is not None]:
                living.remove(one)
                if one.process.returncode != 0:
                    raise PartFailed(
                        f"the part with {one.part.name} ended with exit code "
                        f"{one.process.returncode} {one.last_words(lines)}"
                    )
            for one in living:
                if time.monotonic() - one.heard > patience_s:
                    raise PartFailed(
                        f"the part with {one.part.name} has said nothing for {patience_s:g} s and "
                        f"was ended {one.last_words(lines)}"
                    )
    finally:
        for one in watched:
            one.end()


class Watched:
    """A running part: its process, its last sign of life, its output."""

    def __init__(self, part: Part, cwd: Path):
        self.part, self.cwd = part, cwd
        self.heard = time.monotonic()
        self.doing = "starting"
        # Process ids: a launcher gives its ranks sessions of their own.
        self.workers: set[int] = set()
        self.output: deque[str] = deque(maxlen=30)
        self.raised: list[
            str
            # Lines that end a Python traceback: a launcher's own follow and push them out of
            # `output`.
        ] = []
        self.process = subprocess.Popen(
            part.command,
            env=part.environment,
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def read_into(self, lines: queue.Queue) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            lines.put((self, line.rstrip("\n")))

    def take(self, line: str) -> str | None:
        """Note a line; returns its text if it is progress."""
        self.heard = time.monotonic()
        other, mark, said = line.rpartition(MARK)
        if not mark:
            self.output.append(line)
            if RAISED.match(line) and len(self.raised) < 8:
                self.raised.append(line)
            return None
        if other:  # a library had not ended its line
            self.output.append(other)
        pid, _, text = said.partition(" ")
        self.workers.add(int(pid))
        self.doing = text or self.doing
        return text

    def last_words(self, lines: queue.Queue) -> str:
        time.sleep(0.2)  # for what the reader still has in hand
        while not lines.empty():
            one, line = lines.get()
            one.take(line)
        raised = (
            "What it raised:\n" + "\n".join(f"  {line}" for line in self.raised) + "\n"
            if self.raised
            else ""
        )
        words = f"(it was at: {self.doing}). {raised}Its last lines:\n" + "\n".join(
            f"  {line}" for line in self.output
        )
        for note in sorted(self.cwd.glob(f"{STUCK}*")):
            if lines_of := note.read_text().splitlines()[-MOST_STACK_LINES:]:
                words += f"\n{note.stem.removeprefix(STUCK)} was for long at:\n" + "\n".join(
                    f"  {line}" for line in lines_of
                )
        return words

    def end(self) -> None:
        """End all that still runs: ranks by id, the launcher by signals."""
        if (code := self.process.poll()) is not None and code >= 0:
            return  # it ended by itself, and a launcher that does has ended its ranks
        with contextlib.suppress(ProcessLookupError):
            # A launcher passes it on to ranks that have not spoken yet.
            self.process.send_signal(signal.SIGTERM)
        for pid in self.workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
