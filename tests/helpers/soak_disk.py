"""Forks of a run, killed at a call that changes the disk."""

from __future__ import annotations

import builtins
import io
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import train_loop

UPDATES = 4
LONGEST_S = 120  # of a fork; a run takes 2 s, and one that hangs is killed and counts as wrong
CALLS = (
    "write",
    "fsync",
    "ftruncate",
    "rename",
    "replace",
    "mkdir",
    "rmdir",
    "unlink",
)  # of os; and writes of open files
Kill = tuple[int, bool]  # before which call; whether a write has written half of its bytes by then


def words_of(model: str, rows: str, runs: Path, updates: int = UPDATES) -> list[str]:
    return [
        f"model.id={model}", f"data.source={rows}", "data.template=chat", "data.max_tokens=96",
        "data.heldout=0.2", "lora.r=4", "lora.dropout=0.1", "batch.size=2", "batch.accumulation=1",
        f"schedule.updates={updates}", "schedule.warmup_updates=2", "optimizer.lr=1e-2",
        "execution.precision=fp32", "execution.deterministic=true", "execution.preflight=false",
        "execution.checkpointing=false", "evaluation.every_updates=2",
        "evaluation.generate_rows=0", "evaluation.samples=0", "checkpoint.every_updates=1",
        "checkpoint.keep=1", "record.probe_every_updates=2", f"run.dir={runs}",
    ]  # fmt: skip


class Disk:
    """Count the calls that change something below `root`.

    Die by SIGKILL at `kill`.
    """

    def __init__(self, root: Path, kill: Kill | None) -> None:
        self.root, self.kill = f"{root}/", kill
        self.kinds: list[str] = []

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self._counted(name, getattr(os, name)))
        genuine = io.open

        def opened(*words: Any, **named: Any) -> Any:
            return self._file(genuine(*words, **named), words[0])

        builtins.open = io.open = opened  # pyright: ignore[reportAttributeAccessIssue]

    def reached(self, kind: str, half: Callable[[], Any] | None = None) -> None:
        if self.kill is not None and self.kill[0] == len(self.kinds):
            if self.kill[1] and half is not None:
                half()
            os.kill(os.getpid(), signal.SIGKILL)
        self.kinds.append(kind)

    def inside(self, place: Any, dir_fd: int | None = None) -> bool:
        try:
            path = (
                os.readlink(f"/proc/self/fd/{place}")
                if isinstance(place, int)
                else os.fspath(place)
            )
            folder = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        except OSError:
            return False
        return os.path.join(folder, path).startswith(self.root)

    def _counted(self, name: str, genuine: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if self.inside(arguments[0], named.get("dir_fd")):
                data = arguments[1] if name == "write" else b""
                self.reached(
                    name, (lambda: genuine(arguments[0], data[: len(data) // 2])) if data else None
                )
            return genuine(*arguments, **named)

        return call

    def _file(self, file: Any, place: Any) -> Any:
        return Written(self, file) if file.writable() and self.inside(place) else file


class Written:
    """An open file whose writes are counted."""

    def __init__(self, disk: Disk, file: Any) -> None:
        self.disk, self.file = disk, file

    def write(self, data: Any) -> int:
        self.disk.reached(
            "write", lambda: (self.file.write(data[: len(data) // 2]), self.file.flush())
        )
        return self.file.write(data)

    def __enter__(self) -> Written:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __iter__(self) -> Any:
        return iter(self.file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def forked(
    argv: list[str], log: Path, root: Path, kill: Kill | None = None, after_s: float | None = None
) -> int | None:
    """Exit code of the command in a fork.

    None if `kill` or `after_s` killed it.
    """
    child = os.fork()
    if child == 0:
        code = 99
        signal.alarm(LONGEST_S)
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.dup2(output, 1)
            os.dup2(output, 2)
            disk = Disk(root, kill)
            disk.install()
            code = train_loop.main(argv)
            Path(log).with_suffix(".calls").write_text("\n".join(disk.kinds))
        except BaseException:  # it may not come back into the parent's code
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    if after_s is not None:
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)  # a child that has ended stays there until it is waited for
    status = os.waitpid(child, 0)[1]
    return (
        None
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        else os.waitstatus_to_exitcode(status)
    )
