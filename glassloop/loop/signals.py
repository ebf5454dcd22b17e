"""What signals ask of a run. A handler only sets a flag; the gate carries it to all ranks."""

from __future__ import annotations

import signal
from typing import Any


class StopFlag:
    """Set by the first SIGINT or SIGTERM. The gate carries it to all ranks; further signals change nothing, since a launcher sends several."""

    def __init__(self) -> None:
        self.asked = False
        self.by: str | None = None

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._set)

    def _set(self, number: int, _frame: Any) -> None:
        self.asked, self.by = True, self.by or signal.Signals(number).name


class CaptureFlag:
    """Set by SIGUSR1: the update under way, or the next one, is kept whole. The gate carries it to all ranks."""

    def __init__(self) -> None:
        self.asked = False

    def listen(self) -> None:
        signal.signal(signal.SIGUSR1, self._set)

    def _set(self, _number: int, _frame: Any) -> None:
        self.asked = True

    def take(self) -> bool:
        """Whether it was set; it is not any more."""
        asked, self.asked = self.asked, False
        return asked
