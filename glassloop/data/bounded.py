"""Bounds on time and memory of a chat template.

A template is a stranger's program.

jinja2's sandbox keeps a template from files and Python; it does not keep it from a loop that never
ends or a string that fills the memory.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

SECONDS = 10.0  # of one rendering, which takes milliseconds
GIB = 2**30
MEMORY = 2 * GIB  # that one rendering may add to the process


class TemplateError(ValueError):
    """A template that breaks a bound, or fails in any other way."""


@contextlib.contextmanager
def bounded(what: str, seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Bound the block; every error of it becomes a TemplateError about `what`.

    The time is bounded on the main thread only, where Python runs signal handlers; the memory on
    Linux only, by RLIMIT_AS.
    """
    try:
        with _alarm(seconds), _memory(memory):
            yield
    except MemoryError as error:
        raise TemplateError(f"{what} needs more than {memory / GIB:g} GiB of memory") from error
    except RecursionError as error:
        raise TemplateError(f"{what} calls itself without an end") from error
    except _TookTooLongError as error:
        raise TemplateError(f"{what} has not ended after {seconds:g} s") from error
    except Exception as error:  # a template raises what it likes
        reason = str(error).strip() or "no reason given"
        raise TemplateError(f"{what} fails: {reason[:300]} ({type(error).__name__})") from error


class _TookTooLongError(BaseException):
    """No Exception: a template's own library must not catch it."""


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise _TookTooLongError

    before = signal.signal(signal.SIGALRM, ring)
    left, every = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left, every)  # of whoever set one before


@contextlib.contextmanager
def _memory(more: int) -> Iterator[None]:
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    least = min(limit for limit in (soft, hard, now + more) if limit != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, (least, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
