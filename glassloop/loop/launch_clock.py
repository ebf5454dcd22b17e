"""The time from a launch to its first update, by phase.

A run's event `launch` has it, on rank 0's clock:

    launcher     from the launcher's start to this process's own, where one started it
    imports      until the run is built: Python, torch, transformers, the command line
    ranks        checks, the process group, the model's config, the folder's lock
    data         tokenizer and rows
    base         the frozen base and its adapters; `fused` compiles its kernels beside it
    proof        `fused` against the reference; the optimizer
    room         the plan's contract, files, memory spent by memory.profile
    preflight    the heaviest pass
    evaluation   held-out rows and samples before the first update
    update       the first update itself
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from glassloop.record.observers import RunInfo
from glassloop.record.records import (
    EvaluationRecord,
    Event,
    MachineRecord,
    ProbeRecord,
    RowRecord,
    SampleRecord,
    UpdateRecord,
)

LEAST_S = 0.05  # of a phase that the sentence names


def now_s() -> float:
    """Seconds since the machine's start.

    The system dates processes on this clock.
    """
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def started_s(pid: int | str = "self", proc: Path = Path("/proc")) -> float | None:
    """Seconds from the machine's start to a process's.

    None if the system does not tell.
    """
    try:
        said = (proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
        ticks = int(said.rpartition(")")[2].split()[19])  # field 22; a name may hold spaces
    except (OSError, IndexError, ValueError):
        return None
    return ticks / os.sysconf("SC_CLK_TCK")


class LaunchClock:
    """Phases of a launch, each from the end of the one before.

    Args:
        began: seconds at which the first phase begins; None: when this process began.
    """

    def __init__(self, began: float | None = None, now: Callable[[], float] = now_s):
        self.now = now
        own = started_s() if began is None else began
        self.last = now() if own is None else own
        self.phases: dict[str, float] = {}
        parent = started_s(os.getppid()) if began is None and "LOCAL_RANK" in os.environ else None
        if parent is not None and parent <= self.last:
            self.phases["launcher"] = self.last - parent

    def ends(self, phase: str) -> None:
        """Add the time since the last end to a phase."""
        now = self.now()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self.last
        self.last = now

    @property
    def details(self) -> dict[str, float]:
        """Seconds by phase, and in all."""
        rounded = {f"{name}_s": round(seconds, 2) for name, seconds in self.phases.items()}
        return rounded | {"all_s": round(sum(self.phases.values()), 2)}

    def __str__(self) -> str:
        named = (f"{name} {one:.1f}" for name, one in self.phases.items() if one >= LEAST_S)
        return (
            f"the first update ended {sum(self.phases.values()):.1f} s after the launch: "
            + ", ".join(named)
        )


class LaunchObserver:
    """Ends the last phases of a clock, and tells it once.

    Args:
        tell: gives an event to all observers.
    """

    def __init__(self, clock: LaunchClock, tell: Callable[..., None]):
        self.clock: LaunchClock | None = clock
        self.tell = tell

    def on_start(self, info: RunInfo) -> None:
        self._ends("room")

    def on_event(self, event: Event) -> None:
        if event.kind in ("started", "resumed"):
            self._ends("preflight")

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self._ends("evaluation")

    def on_sample(self, sample: SampleRecord) -> None:
        self._ends("evaluation")

    def on_update(self, record: UpdateRecord, rows: tuple[RowRecord, ...]) -> None:
        if self.clock is not None:
            clock, self.clock = self.clock, None
            clock.ends("update")
            self.tell(record.update, "launch", str(clock), **clock.details)

    def on_machine(self, record: MachineRecord) -> None: ...

    def on_probe(self, record: ProbeRecord) -> None: ...

    def close(self) -> None: ...

    def _ends(self, phase: str) -> None:
        if self.clock is not None:
            self.clock.ends(phase)
