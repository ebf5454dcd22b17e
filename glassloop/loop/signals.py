"""Signals that a run answers.

A handler only sets a flag. The gate carries it to all ranks.
"""

from __future__ import annotations

import signal
from typing import Any

# Ctrl-C, a launcher or scheduler, a terminal that is gone, Ctrl-\: each ends with a checkpoint.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
LEFT_IGNORED = (signal.SIGHUP, signal.SIGQUIT)  # where nohup or a shell has them ignored


class StoppedEarly(BaseException):
    """A stop before the run has begun, with nothing to save.

    It is raised in the main thread.
    """


class StopFlag:
    """Flag of the first signal of STOPS.

    Further signals change nothing: a launcher sends several.

    Attributes:
        by: the signal's name, or why else.
        raises: a signal also raises StoppedEarly, since the run has not begun.
        guarded: a Guard puts the handlers back, after the run's end.
    """

    def __init__(self) -> None:
        self.asked = False
        self.by: str | None = None
        self.raises = False
        self.guarded = False
        self._before: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """Handle STOPS from here on.

        For the main thread. A second call does nothing.
        """
        for number in STOPS if not self._before else ():
            if number in LEFT_IGNORED and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._set)

    def restore(self) -> None:
        """Put the handlers of before back."""
        while self._before:
            number, handler = self._before.popitem()
            if signal.getsignal(number) == self._set:
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def ask(self, why: str) -> None:
        """Ask for the stop; the first to ask is named."""
        self.asked, self.by = True, self.by or why

    @property
    def exit_code(self) -> int:
        """Exit code of a run that ended on demand.

        130 after Ctrl-C, as shells expect, else 0.
        """
        return 130 if self.by == signal.SIGINT.name else 0

    def _set(self, number: int, _frame: Any) -> None:
        self.ask(signal.Signals(number).name)
        if self.raises:
            self.raises = False
            raise StoppedEarly(self.by)


class CaptureFlag:
    """Flag of SIGUSR1: keep this update, or the next one, whole.

    The gate carries it to all ranks.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def listen(self) -> None:
        """Handle SIGUSR1 from here on."""
        self._before = signal.signal(signal.SIGUSR1, self._set)

    def restore(self) -> None:
        """Ignore SIGUSR1 from here on.

        A late signal must not kill a run that ends.
        """
        if signal.getsignal(signal.SIGUSR1) == self._set:
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def _set(self, _number: int, _frame: Any) -> None:
        self.asked = True

    def answered(self) -> None:
        """Clear the flag: an update was looked at with it."""
        self.asked = False
