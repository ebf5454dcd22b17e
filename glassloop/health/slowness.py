"""Slow updates, each with its likely cause.

An update is slow if it took much longer than the last ones lead to expect. An update with more
places may take longer in proportion, and one with fewer is not expected to be faster, so ragged
rows alone raise nothing. The cause is what lies far from usual on the rank where the time went.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from glassloop.record.records import MachineRecord, UpdateRecord

WINDOW = 20  # sound updates that a new one is compared with
LEAST = 6  # of them before anything is called slow
WARMUP = 2  # first updates of a process, in which caches and kernels are made
FACTOR = 1.5  # times the expected time
ABOVE_ALL = 1.15  # times the window's slowest, for as many places
NEW_LEVEL = 5  # slow updates in a row: that is how fast it is now
PART = 0.5  # of the lost time that a part must explain

NOTHING = "nothing on record says why"

Pair = tuple[UpdateRecord, MachineRecord | None]


@dataclass(frozen=True)
class Slow:
    """A slow update and its likely cause."""

    cause: str  # see CAUSES
    message: str
    rank: int | None  # where the time went; None: on all, or unknown
    took_s: float
    expected_s: float

    @property
    def details(self) -> dict[str, Any]:
        return {
            "cause": self.cause,
            "rank": self.rank,
            "took_s": self.took_s,
            "expected_s": self.expected_s,
        }


CAUSES = {
    "throttled": "the card lowered its clock",
    "shared card": "another process computes on the card",
    "allocator": "memory was taken from CUDA anew",
    "disk": "the rank waited for a disk",
    "host": "the host did not keep the card busy, or other work took its processors",
    "rank": f"the others waited for one rank, and {NOTHING}",
    "reduction": "the sum of gradients over ranks took long",
    "unknown": NOTHING,
}


@dataclass
class SlowUpdates:
    """The updates that a new one is compared with.

    Call `look` once an update.
    """

    window: list[Pair] = field(default_factory=list)
    slow: list[Pair] = field(default_factory=list)  # in a row, up to now
    seen: int = 0

    def look(self, update: UpdateRecord, machine: MachineRecord | None) -> Slow | None:
        """Judge an update, and remember it."""
        self.seen += 1
        if update.supervised_tokens == 0 or self.seen <= WARMUP:
            return None
        if self.window and len(self.window[-1][0].rank_passes) != len(update.rank_passes):
            self.window, self.slow = [], []  # resumed with other ranks
        scaled = [_scaled(one, update) for one, _ in self.window]
        expected = statistics.median(scaled) if scaled else 0.0
        found = None
        if len(scaled) >= LEAST and update.update_s > max(
            FACTOR * expected, ABOVE_ALL * max(scaled)
        ):
            found = _explained((update, machine), self.window, expected)
            self.slow.append((update, machine))
            if len(self.slow) >= NEW_LEVEL:
                self.window, self.slow = self.slow, []
        else:
            self.window, self.slow = [*self.window, (update, machine)][-WINDOW:], []
        return found


def _places(update: UpdateRecord) -> int:
    return max(1, *update.rank_slot_tokens)


def _scaled(one: UpdateRecord, update: UpdateRecord) -> float:
    """The time of `one`, had it as many places as `update`."""
    return one.update_s * max(1.0, _places(update) / _places(one))


def _explained(pair: Pair, window: Sequence[Pair], expected: float) -> Slow:
    update, machine = pair
    lost = update.update_s - expected
    passes = [_lost_in_passes(update, window, rank) for rank in range(len(update.rank_passes))]
    late = max(range(len(passes)), key=passes.__getitem__)
    reduction = update.reduce_s - statistics.median(one.reduce_s for one, _ in window)
    rank = None
    if passes[late] >= PART * lost:
        others = [one for rank, one in enumerate(passes) if rank != late]
        alone = bool(others) and max(others) < PART * passes[late]
        rank = late if alone else None
        cause, why = _cause(machine, window, late, lost) or (
            "rank" if alone else "unknown",
            NOTHING,
        )
        if alone:
            join = ", and " if why == NOTHING else ": "
            why = f"the others waited for rank {late}{join}{why}"
    elif reduction >= PART * lost:
        cause, why = "reduction", f"summing gradients took {update.reduce_s:.3g} s of it"
    else:
        cause, why = "unknown", f"not in its passes; {NOTHING}"
    took = f"update {update.update} took {update.update_s:.3g} s where {expected:.3g} s were usual"
    return Slow(cause, f"{took}: {why}", rank, update.update_s, expected)


def _lost_in_passes(update: UpdateRecord, window: Sequence[Pair], rank: int) -> float:
    """Seconds of a rank's passes beyond the usual."""
    if update.rank_passes_s is None:
        return 0.0
    usual = [
        one.rank_passes_s[rank] * max(1.0, _places(update) / _places(one))
        for one, _ in window
        if one.rank_passes_s is not None
    ]
    return update.rank_passes_s[rank] - statistics.median(usual) if usual else 0.0


def _cause(
    machine: MachineRecord | None, window: Sequence[Pair], rank: int, lost: float
) -> tuple[str, str] | None:
    """The likely cause on a rank, with its evidence in words.

    Args:
        lost: seconds that the rank lost.
    """
    if machine is None:
        return None
    seen = _Readings(machine, [one for _, one in window if one is not None], rank)
    clock, usual_clock = seen.now("sm_clock_mhz"), seen.usual("sm_clock_mhz")
    clocks = "" if clock is None or not usual_clock else (
        f", clock {clock:,.0f} MHz, usually {usual_clock:,.0f}"
    )  # fmt: skip
    reasons = seen.throttle()
    slower = clock is not None and usual_clock is not None and clock < 0.9 * usual_clock
    if slower or (reasons and reasons != "power cap" and reasons not in seen.usual_throttles()):
        heat = seen.now("temperature_c")
        warm = "" if heat is None else f" at {heat:.0f} C"
        return "throttled", f"its card was throttled ({reasons or 'no reason told'}{warm}{clocks})"
    if seen.above("other_processes", 1.0, 0.5):
        count = seen.now("other_processes")
        return "shared card", f"{count:.0f} other processes compute on its card"
    if seen.above("processor_wait_s", 1.0, PART * lost):
        waited = seen.now("processor_wait_s")
        return "host", f"it waited {waited:.3g} s for a processor: other work took them"
    if seen.above("device_allocations", 3.0, 2):
        return "allocator", f"CUDA was asked for memory {seen.both('device_allocations')}"
    if seen.above("disk_faults", 10.0, 50):
        return "disk", f"{seen.both('disk_faults')} page faults waited for a disk"
    if seen.above("read_mib", 4.0, 64):
        return "disk", f"it read {seen.both('read_mib')} MiB from disks"
    if seen.above("preempted", 10.0, 100):
        return "host", f"other processes took its processor {seen.both('preempted')} times"
    busy, usual_busy = seen.now("card_busy"), seen.usual("card_busy")
    if busy is not None and usual_busy is not None and busy < 0.8 * usual_busy:
        return "host", f"its card was busy {busy:.0%} of the time, usually {usual_busy:.0%}"
    return None


@dataclass(frozen=True)
class _Readings:
    """One rank's readings beside the window's."""

    machine: MachineRecord
    window: Sequence[MachineRecord]
    rank: int

    def now(self, name: str) -> float | None:
        return _of(self.machine, name, self.rank)

    def usual(self, name: str) -> float | None:
        known = [value for one in self.window if (value := _of(one, name, self.rank)) is not None]
        return statistics.median(known) if known else None

    def above(self, name: str, factor: float, least: float) -> bool:
        """More than `factor` times the usual, and `least` more than it."""
        now, usual = self.now(name), self.usual(name)
        return now is not None and usual is not None and now > factor * usual + least

    def both(self, name: str) -> str:
        return f"{self.now(name):,.0f} (usually {self.usual(name):,.0f})"

    def throttle(self) -> str:
        return _throttle(self.machine, self.rank)

    def usual_throttles(self) -> set[str]:
        return {_throttle(one, self.rank) for one in self.window}


def _throttle(machine: MachineRecord, rank: int) -> str:
    return "" if machine.rank_throttle is None else machine.rank_throttle[rank] or ""


def _of(machine: MachineRecord, name: str, rank: int) -> float | None:
    values = getattr(machine, f"rank_{name}")
    return None if values is None else values[rank]
