"""How the ranks of a run meet, and what a failure says."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")

NOTE_S = 30.0  # of waiting, until a line says so
LAUNCHER_S = 10.0  # for a launcher on this host, which listens before it starts its ranks
LIBRARIES = ("gloo", "nccl", "c10d", "store")  # names in the errors of a meeting


def meet(begin: Callable[[], T], timeout_s: float) -> T:
    """What `begin` returns, once it has joined this rank to the others.

    Raises:
        ValueError: they did not meet within `timeout_s`; names address, rank and the cure.
    """
    ranks = _number("WORLD_SIZE", 1)
    if ranks < 2 or dist.is_initialized():
        return begin()
    with _noted(f"{_who()} waits for the other ranks at {_where()}"):
        _reach(timeout_s)
        try:
            return begin()
        except RuntimeError as error:
            text = str(error).partition("\n")[0]
            if not isinstance(error, dist.DistError) and not any(
                name in text.lower() for name in LIBRARIES
            ):
                raise
            raise ValueError(f"{_missed(timeout_s)} ({text})") from error


def _reach(timeout_s: float) -> None:
    """Wait until something listens where the ranks meet.

    Without a launcher, rank 0 itself listens.
    """
    launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address = (os.environ.get("MASTER_ADDR"), _number("MASTER_PORT", 0))
    if not all(address) or (_number("RANK", 0) == 0 and not launcher):
        return
    until = time.monotonic() + (min(LAUNCHER_S, timeout_s) if launcher else timeout_s)
    while True:
        try:
            socket.create_connection(address, timeout=5.0).close()  # pyright: ignore[reportArgumentType]
            return
        except OSError as error:
            if time.monotonic() < until:
                time.sleep(0.5)
                continue
            if launcher and isinstance(error, ConnectionRefusedError):
                raise ValueError(
                    f"the launcher of this rank is gone: nothing listens at {_where()} any more. "
                    "Start the run again"
                ) from error
            raise ValueError(f"{_missed(timeout_s)} ({error})") from error


def _missed(timeout_s: float) -> str:
    ranks = os.environ["WORLD_SIZE"]
    return (
        f"{_who()} did not meet the others at {_where()} within {timeout_s:.0f} s: start all "
        f"{ranks} with `accelerate launch`, which announces and starts them, let them reach that "
        "address, or unset RANK, LOCAL_RANK and WORLD_SIZE for a run of one process"
    )


def _who() -> str:
    return f"rank {_number('RANK', 0)} of {os.environ.get('WORLD_SIZE', '1')}"


def _where() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _number(name: str, usual: int) -> int:
    text = os.environ.get(name) or str(usual)
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"the environment says {name}={text!r}, which is no number: unset it, or let "
            "`accelerate launch` set it"
        ) from None


@contextlib.contextmanager
def _noted(line: str) -> Iterator[None]:
    """Say the line where the block takes over NOTE_S."""
    timer = threading.Timer(NOTE_S, lambda: print(line, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
