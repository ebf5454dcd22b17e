"""Bounds on how long a process may take to end.

They cover a stop during start-up, a launcher that is gone, and an end that hangs.

A thread does it, because the main thread may be in a call that does not return and runs no handler
meanwhile. Signals reach the thread through Python's wakeup descriptor.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from glassloop.loop.signals import STOPS, StopFlag

TICK_S = 0.5
EARLY_S = 5.0  # from a stop during start-up to the end of a process that does not get there itself
LATE_S = 10.0  # the same for a stop that comes after the run's end
ORPHAN_S = 600.0  # the same for a run whose launcher is gone
EXIT_S = 20.0  # for the interpreter's own end
TURN_S = 20.0  # for the rank that speaks for its host
LAUNCHED = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")  # set by Accelerate's launcher

_active: Guard | None = None
_forking = threading.local()


class Guard:
    """Watches over this process; a context manager for the main thread.

    It has three parts: start-up from `starts` (nothing is to save), the run from `begins`, and the
    end from the first `within`.

    Args:
        stop: set by signals, also while the main thread is blocked, and by a launcher's end.
        launched: a launcher started this process, and its end ends the run. None: see LAUNCHED.

    Attributes:
        code: the exit code of a process that this one has to end.
    """

    def __init__(self, stop: StopFlag | None = None, *, launched: bool | None = None) -> None:
        self.stop = stop or StopFlag()
        self.code = 1
        self._launched = any(map(os.environ.get, LAUNCHED)) if launched is None else launched
        self._parent = os.getppid()
        self._part = "start"
        self._latest: dict[str, float] = {}  # why the process is ended -> when, monotonic
        self._over = threading.Event()
        self._ear, self._mouth = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="guard", daemon=True)

    def __enter__(self) -> Guard:
        global _active
        self.stop.guarded = True
        self.stop.listen()
        self._mouth.setblocking(False)
        self._before = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        _active = self
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        global _active
        self.stop.raises = False
        self._over.set()
        signal.set_wakeup_fd(self._before)
        self.stop.restore()
        _active = None
        self._thread.join()
        self._ear.close()
        self._mouth.close()

    def starts(self) -> None:
        """A stop raises StoppedEarly in the main thread from here on."""
        self.stop.raises = True

    def begins(self) -> None:
        """A stop ends the run with a checkpoint from here on."""
        self.stop.raises, self._part = False, "run"

    @contextlib.contextmanager
    def within(self, seconds: float, what: str) -> Iterator[None]:
        """Bound a part of the end.

        Beyond `seconds` the process ends with `code` and says so.
        """
        self.stop.raises, self._part = False, "end"
        why = f"{what} took over {seconds:.0f} s"
        self._latest[why] = time.monotonic() + seconds
        try:
            yield
        finally:
            del self._latest[why]

    def _watch(self) -> None:
        orphan = False
        while not self._over.is_set():
            if select.select([self._ear], [], [], TICK_S)[0]:
                for number in set(self._ear.recv(4096)) & set(STOPS):
                    self._asked(signal.Signals(number).name)
            if self._launched and not orphan and os.getppid() != self._parent:
                orphan = True
                self._interrupt(f"the launcher, process {self._parent}, is gone")
            for why, latest in list(self._latest.items()):
                if time.monotonic() >= latest:
                    end_now(why, self.code)

    def _asked(self, why: str) -> None:
        """Bound what follows a stop.

        A run's own loop ends it.
        """
        self.stop.ask(why)
        if self._part != "run":
            patience = EARLY_S if self._part == "start" else LATE_S
            told = f"asked to end ({self.stop.by}), it has not within {patience:.0f} s"
            self._latest.setdefault(told, time.monotonic() + patience)

    def _interrupt(self, why: str) -> None:
        """Do what a signal would do."""
        self._asked(why)
        self._latest.setdefault(f"{why} for {ORPHAN_S:.0f} s", time.monotonic() + ORPHAN_S)
        if self.stop.raises:
            os.kill(os.getpid(), signal.SIGTERM)  # the handler raises in the main thread


def end_now(why: str, code: int) -> None:
    """End this process without its clean-up; say why, unless the stream blocks."""
    line = f"\nrank {os.environ.get('RANK', '0')}: {why}: it ends here, with exit code {code}"
    words = threading.Thread(target=say, args=(line,), daemon=True)
    words.start()
    words.join(1.0)
    os._exit(code)


def end_process(code: int) -> NoReturn:
    """End this process with its clean-up, but for what hangs in it.

    Interpreter shutdown joins threads and runs destructors of the libraries' process groups, which
    can wait for ranks that are gone; nothing of that is needed any more.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    late = threading.Timer(EXIT_S, end_now, (f"clean-up at exit took over {EXIT_S:.0f} s", code))
    late.daemon = True
    late.start()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed at its other end
            stream.flush()
    os._exit(code)


def say(line: str) -> None:
    """Print to standard error, unless its other end is gone."""
    with contextlib.suppress(OSError, ValueError):  # closed at its other end
        print(line, file=sys.stderr, flush=True)


def say_once_a_host(line: str) -> None:
    """Say what every rank of a host would say.

    Local rank 0 says it. The others wait until the launcher ends them: it would end rank 0 without
    its word if another were gone first. One that nobody ends within TURN_S was alone with it, and
    says it itself.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(TURN_S)
    say(line)


def _before_fork() -> None:
    """Hold signals back around a fork.

    A new child still has this run's handlers.
    """
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS) if _active else None


def _in_parent() -> None:
    if _forking.mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _in_child() -> None:
    """Give a forked child its own signals back.

    Signals of a pool's workers are not this run's.
    """
    global _active
    if _active is not None:
        signal.set_wakeup_fd(-1)
        _active.stop.restore()
        _active = None
    _in_parent()


os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
