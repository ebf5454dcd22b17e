"""Readings of the machine during an update.

A thread of its own asks the card and the host's free memory. The main thread reads the process's
counters at both ends of the passes: a few system calls.
"""

from __future__ import annotations

import math
import resource
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING, Any

from glassloop.health.nvml import Card, CardReading, throttle_names
from glassloop.record.records import MachineRecord

if TYPE_CHECKING:
    import torch

PAGE_GIB = resource.getpagesize() / 2**30
MOST_READINGS = 4096  # kept of one update; later ones are dropped
MOST_SHARE = 0.0015  # of a processor's time, for the thread


@dataclass(frozen=True)
class Counters:
    """What a process has used since it began."""

    page_faults: float
    disk_faults: float
    read_mib: float | None
    cpu_s: float
    preempted: float
    processor_wait_s: float | None
    device_allocations: float | None


@dataclass(frozen=True)
class Machine:
    """One rank's readings of one update; None for unknown.

    Names and units are those of MachineRecord.
    """

    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    throttle: float | None = None  # bits
    card_busy: float | None = None
    pcie_in_mb_s: float | None = None
    pcie_out_mb_s: float | None = None
    other_processes: float | None = None
    device_allocations: float | None = None
    host_gib: float | None = None
    host_free_gib: float | None = None
    page_faults: float | None = None
    disk_faults: float | None = None
    read_mib: float | None = None
    cpu_s: float | None = None
    preempted: float | None = None
    processor_wait_s: float | None = None

    def numbers(self) -> tuple[float, ...]:
        """All fields as floats, NaN for None, to cross the gate."""
        return tuple(math.nan if one is None else float(one) for one in astuple(self))


FIELDS = tuple(field.name for field in fields(Machine))


class Sampler:
    """The readings of one rank. Without `every_s` it reads nothing.

    Args:
        card: the rank's; None without one.
        every_s: seconds between two readings of card and free memory; more, where a reading would
            take more than MOST_SHARE of a processor.
        sharing: ranks of this run on the card.
        allocations: counts the calls so far that took memory from CUDA.
    """

    def __init__(
        self,
        card: Card | None = None,
        every_s: float | None = None,
        *,
        sharing: int = 1,
        allocations: Callable[[], float | None] = lambda: None,
    ) -> None:
        self.card, self.every_s = card, every_s
        self.sharing, self.allocations = sharing, allocations
        self._readings: list[tuple[CardReading, float | None]] = []
        self._newest: tuple[CardReading, float | None] | None = None
        self._began: Counters | None = None
        self._over, self._lock = threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to read, until `close`."""
        if self.every_s is not None and self._thread is None:
            self._thread = threading.Thread(
                target=self._read_on, args=(self.every_s,), name="machine", daemon=True
            )
            self._thread.start()

    def close(self) -> None:
        """End the thread; it may be inside the driver for a moment."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(timeout=2.0)

    def begin(self) -> None:
        """An update begins."""
        if self.every_s is not None:
            self._began = counters(self.allocations)
            with self._lock:
                self._readings.clear()

    def take(self) -> tuple[float, ...]:
        """The readings since `begin`, as `Machine.numbers`; () if nothing is read."""
        if self.every_s is None or self._began is None:
            return ()
        with self._lock:
            readings = list(self._readings)
            if not readings and self._newest is not None:
                readings = [self._newest]
        return machine_of(
            readings, self._began, counters(self.allocations), sharing=self.sharing
        ).numbers()

    def read_once(self) -> None:
        """Take one reading."""
        reading = self.card.read() if self.card is not None else CardReading()
        with self._lock:
            self._newest = (reading, host_free_gib())
            if len(self._readings) < MOST_READINGS:
                self._readings.append(self._newest)

    def _read_on(self, every_s: float) -> None:
        while not self._over.is_set():
            began = time.thread_time()
            self.read_once()
            self._over.wait(pause_s(every_s, time.thread_time() - began))


def pause_s(every_s: float, reading_s: float) -> float:
    """Seconds between two readings that take `reading_s` of a processor each."""
    return max(every_s, reading_s / MOST_SHARE)


def machine_of(
    readings: Sequence[tuple[CardReading, float | None]],
    began: Counters,
    ended: Counters,
    *,
    sharing: int,
) -> Machine:
    """Sum an update's readings up.

    Args:
        readings: of the card, and GiB of memory that the host had free.
        sharing: ranks of this run on the card.
    """

    def known(name: str) -> list[float]:
        found = (getattr(card, name) for card, _ in readings)
        return [value for value in found if value is not None]

    def mean(name: str) -> float | None:
        values = known(name)
        return math.fsum(values) / len(values) if values else None

    def grown(name: str) -> float | None:
        before, after = getattr(began, name), getattr(ended, name)
        return None if before is None or after is None else after - before

    bits = 0
    for value in known("throttle"):
        bits |= int(value)
    processes = max(known("processes"), default=None)
    return Machine(
        sm_clock_mhz=mean("sm_clock_mhz"),
        memory_clock_mhz=mean("memory_clock_mhz"),
        power_w=mean("power_w"),
        temperature_c=max(known("temperature_c"), default=None),
        throttle=float(bits) if known("throttle") else None,
        card_busy=mean("card_busy"),
        pcie_in_mb_s=mean("pcie_in_mb_s"),
        pcie_out_mb_s=mean("pcie_out_mb_s"),
        other_processes=None if processes is None else max(0.0, processes - sharing),
        device_allocations=grown("device_allocations"),
        host_gib=resident_gib(),
        host_free_gib=min((free for _, free in readings if free is not None), default=None),
        page_faults=grown("page_faults"),
        disk_faults=grown("disk_faults"),
        read_mib=grown("read_mib"),
        cpu_s=grown("cpu_s"),
        preempted=grown("preempted"),
        processor_wait_s=grown("processor_wait_s"),
    )


def counters(allocations: Callable[[], float | None] = lambda: None) -> Counters:
    """Read the process's counters.

    Call it on the main thread: `processor_wait_s` is the calling thread's own.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    return Counters(
        page_faults=used.ru_minflt,
        disk_faults=used.ru_majflt,
        read_mib=_read_mib(),
        cpu_s=used.ru_utime + used.ru_stime,
        preempted=used.ru_nivcsw,
        processor_wait_s=_processor_wait_s(),
        device_allocations=allocations(),
    )


def cuda_allocations(device: torch.device) -> Callable[[], float | None]:
    """Return a counter of the calls that took memory from CUDA."""
    import torch

    def count() -> float | None:
        stats = torch.cuda.memory_stats_as_nested_dict(device)
        return float(stats.get("num_device_alloc", 0) + stats.get("num_alloc_retries", 0))

    return count if device.type == "cuda" else lambda: None


def machine_record(
    update: int, attempt: int, ranks: Sequence[Sequence[float]]
) -> MachineRecord | None:
    """Join the ranks' numbers into a record; None if they read nothing.

    Args:
        ranks: `Machine.numbers` of each rank.
    """
    if not all(ranks):
        return None
    columns = {
        name: tuple(None if math.isnan(value) else value for value in values)
        for name, values in zip(FIELDS, zip(*ranks, strict=True), strict=True)
    }
    told: dict[str, Any] = {
        f"rank_{name}": values if any(value is not None for value in values) else None
        for name, values in columns.items()
    }
    if told["rank_throttle"] is not None:
        told["rank_throttle"] = tuple(
            None if bits is None else throttle_names(int(bits)) for bits in columns["throttle"]
        )
    return MachineRecord(update, **told, attempt=attempt)


def host_free_gib() -> float | None:
    """Memory that the host could give; None if it does not tell."""
    kib = _number_of("/proc/meminfo", "MemAvailable:")
    return None if kib is None else kib / 2**20


def resident_gib() -> float | None:
    """Resident memory of this process; None if the host does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * PAGE_GIB
    except (OSError, ValueError, IndexError):
        return None


def _read_mib() -> float | None:
    count = _number_of("/proc/self/io", "read_bytes:")
    return None if count is None else count / 2**20


def _processor_wait_s() -> float | None:
    """Time in which this thread was ready and had no processor.

    None if the host does not tell.
    """
    try:
        with open("/proc/thread-self/schedstat", encoding="ascii") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None


def _number_of(path: str, name: str) -> int | None:
    """The number on the line `name` of a file of the kernel's.

    None if the file has none: not Linux, or a container that hides it.
    """
    try:
        with open(path, encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(name))
    except (OSError, ValueError, StopIteration):
        return None
