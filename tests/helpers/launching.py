"""Start processes as a user would.

A script on two CPU ranks, a command, a Python.

They are warm (see warm.py) unless `cold` is asked: then each process imports everything itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import warm

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TWO_CPUS = ROOT / "accelerate_configs" / "cpu_2proc.yaml"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]


def environment(**extra: str) -> dict[str, str]:
    """Environment of a started process.

    Offline, one thread a rank, glassloop importable.
    """
    paths = os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")])
    quiet = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": paths,
    }
    return {**os.environ, **quiet, **extra}


def start(
    command: Sequence[str], *, cold: bool = False, env: dict[str, str] | None = None, **popen: Any
) -> subprocess.Popen[str]:
    """Start a command in the repository's root; `popen` goes to subprocess.Popen."""
    settings = {"cwd": ROOT, "text": True, "stdin": subprocess.DEVNULL, **popen}
    with contextlib.nullcontext() if cold else forking():
        return subprocess.Popen(command, env=env or environment(), **settings)


def run(
    command: Sequence[str], *, timeout_s: float = 300, cold: bool = False, **start_settings: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and keep what it prints.

    A command that takes too long is killed.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start(command, cold=cold, **{**pipes, **start_settings}) as process:
        try:
            output, errors = process.communicate(timeout=timeout_s)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def launch(
    script: str | Path,
    *arguments: str,
    expect: int = 0,
    timeout_s: int = 300,
    config_file: Path = TWO_CPUS,
    cold: bool = False,
    **env: str,
) -> str:
    """Run `script` on two ranks through accelerate launch; return what it printed.

    Fails the test, with the output, on another exit code than `expect`.
    """
    command = [*LAUNCH, str(config_file), str(script), *arguments]
    done = run(command, env=environment(**env), timeout_s=timeout_s, cold=cold)
    output = done.stdout + done.stderr
    assert done.returncode == expect, (
        f"exit code {done.returncode}, expected {expect}:\n{output[-6000:]}"
    )
    return output


class _Server:
    """The process that forks warm ones.

    It starts with the first of them and ends with this one.
    """

    def __init__(self) -> None:
        self.env = {**environment(), **warm.HIDDEN}
        self.env.pop("PYTHONPATH")
        self.asked, other = socket.socketpair()
        command = [sys.executable, str(HERE / "warm.py"), str(other.fileno())]
        self.process = subprocess.Popen(command, env=self.env, pass_fds=[other.fileno()])
        other.close()
        if self.asked.recv(1) != b"!":
            raise RuntimeError(f"tests/helpers/warm.py ended with {self.process.wait()}")

    def fork_exec(self, *given: Any) -> int:
        """Stand in for subprocess._fork_exec: ask the server, and adopt what it forks."""
        asked = warm.Asked(*given[: len(warm.Asked._fields)])
        if asked.others or not asked.understood(self.env):
            return warm.GENUINE(*given)
        _adopt(True)
        try:
            here = {"cwd": os.getcwd()} if asked.cwd is None else {}
            warm.send(self.asked, asked.program() | here, asked.streams)
            return warm.LENGTH.unpack(self.asked.recv(warm.LENGTH.size))[0]
        finally:
            _adopt(False)


def _adopt(adopt: bool) -> None:
    """Whether this process becomes the parent of descendants that lose theirs (Linux)."""
    if ctypes.CDLL(None, use_errno=True).prctl(36, int(adopt), 0, 0, 0):  # PR_SET_CHILD_SUBREAPER
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


_LOCK = threading.Lock()
_servers: list[_Server] = []


@contextlib.contextmanager
def forking() -> Iterator[None]:
    """subprocess starts warm processes meanwhile, where this machine can.

    For a test of code that starts processes of its own.
    """
    if sys.platform != "linux" or warm.GENUINE is None:
        yield
        return
    with _LOCK:
        if not _servers:
            _servers.append(_Server())
        subprocess._fork_exec = _servers[0].fork_exec  # type: ignore[attr-defined]
        try:
            yield
        finally:
            subprocess._fork_exec = warm.GENUINE  # type: ignore[attr-defined]


def ranks_of(launcher: int) -> list[int]:
    """The launcher's processes."""
    try:
        return [
            int(pid)
            for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        ]
    except OSError:
        return []


def write_rows(path: Path, rows: int) -> Path:
    """Write a jsonl file of prompts and completions, always alike.

    Prompts have 1 to 14 words, completions 1 to 9.
    """
    words = [
        "the",
        "caller",
        "asks",
        "for",
        "a",
        "code",
        "and",
        "the",
        "receiver",
        "hangs",
        "up",
        "because",
        "nothing",
        "can",
        "be",
        "checked",
        "today",
    ]
    drawn = random.Random(5)
    lines = [
        {
            "prompt": " ".join(drawn.choices(words, k=drawn.randint(1, 14))),
            "completion": " ".join(drawn.choices(words, k=drawn.randint(1, 9))),
        }
        for _ in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
