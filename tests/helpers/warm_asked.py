"""A process to start, and whether a fork can stand for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

AT_IMPORT = (
    "BNB_",
    "HF_HOME",
    "HF_HUB_",
    "HUGGINGFACE_",
    "MKL_",
    "OMP_",
    "PYTORCH_",
    "TRANSFORMERS_",
    "TRITON_",
)


class Asked(NamedTuple):
    """What subprocess asks of `_fork_exec`, by position."""

    args: Sequence[Any]
    names: Any
    close_fds: bool
    kept: tuple[int, ...]
    cwd: Any
    environment: Sequence[bytes] | None
    in_read: int
    in_write: int
    out_read: int
    out_write: int
    err_read: int
    err_write: int
    told_read: int
    told_write: int
    restore_signals: bool
    new_session: bool
    group: int
    gid: Any
    gids: Any
    uid: Any
    umask: int
    first: Any  # preexec_fn

    @property
    def env(self) -> dict[str, str]:
        if self.environment is None:
            return dict(os.environ)
        return dict(os.fsdecode(one).split("=", 1) for one in self.environment)

    @property
    def streams(self) -> list[int]:
        """Descriptors for 0, 1 and 2."""
        given = enumerate((self.in_read, self.out_write, self.err_write))
        return [own if one == -1 else one for own, one in given]

    @property
    def others(self) -> tuple[int, ...]:
        """Further descriptors that the process keeps."""
        return tuple(one for one in self.kept if one != self.told_write)

    def program(self) -> dict[str, Any]:
        """Arguments of `Place.become`, but for descriptors."""
        return {
            "args": [os.fsdecode(one) for one in self.args],
            "env": self.env,
            "cwd": None if self.cwd is None else os.fsdecode(self.cwd),
            "new_session": bool(self.new_session),
            "group": self.group,
        }

    def understood(self, known: Mapping[str, str]) -> bool:
        """Whether a fork can stand for this command.

        `known`: the environment of the forked process.
        """
        words = [os.fsdecode(one) for one in self.args]
        program = next((one for one in words[1:] if one != "-u"), "-")
        return (
            words[:1] == [sys.executable]
            and (program in ("-m", "-c") or not program.startswith("-"))
            and _at_import(self.env) == _at_import(known)
            and bool(self.close_fds)
            and self[-5:] == (None, None, None, -1, None)
        )


def _at_import(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith(AT_IMPORT)}
