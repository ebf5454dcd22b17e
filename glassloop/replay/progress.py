"""Progress of a replay's search, with an estimate of the rest."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TextIO

Tell = Callable[[int, int, str], None]  # (parts done, parts in all, the part that begins)
EVERY_S = 10.0  # between two lines where nobody can overwrite them


def silent(_done: int, _total: int, _what: str) -> None:
    """Tell nobody."""


@dataclass
class Progress:
    """A stream's lines on what begins.

    One line that is overwritten on a terminal, else one now and then.

    Attributes:
        name: of the search. out: the stream. clock: seconds, for tests.
    """

    name: str
    out: TextIO
    clock: Callable[[], float] = time.monotonic
    started: float | None = field(default=None, init=False)
    last_line: float | None = field(default=None, init=False)

    def __call__(self, done: int, total: int, what: str) -> None:
        now = self.clock()
        if self.started is None:
            self.started = now
        spent = now - self.started
        left = f", about {spent / done * (total - done):.0f} s left" if done and spent >= 1 else ""
        line = f"{self.name:<10}{done + 1} of {total}: {what}{left}"
        if self.out.isatty():
            print(f"\r\033[K{line[:79]}", end="", file=self.out, flush=True)
        elif self.last_line is None or now - self.last_line >= EVERY_S:
            self.last_line = now
            print(line, file=self.out, flush=True)

    def close(self) -> None:
        """Leave the terminal's line free for what comes."""
        if self.started is not None and self.out.isatty():
            print("\r\033[K", end="", file=self.out, flush=True)
