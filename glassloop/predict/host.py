"""Host memory that a machine can spare, and a run locks.

Locked pages cannot be swapped, so a run takes what the system calls available and no cgroup denies,
less a reserve. NVIDIA's driver locks pages itself and does not ask `ulimit -l`: whether it locks
that much, only trying tells.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from glassloop.predict.terms import PHASES, Term

GIB = 2**30
RESERVE_GIB, RESERVE_SHARE = 2.0, 0.1  # of what is available, the larger: for all other programs
UNLIMITED = 1 << 60  # bytes; cgroups of version 1 say "no limit" by a number above


@dataclass(frozen=True)
class HostLedger:
    """Terms of host memory that one rank locks."""

    terms: tuple[Term, ...]

    @property
    def total_bytes(self) -> int:
        return sum(term.size_bytes for term in self.terms)

    def describe(self) -> str:
        """For example "26.2 GiB of host memory locked: activations 25.2, embedding 1.0"."""
        parts = ", ".join(f"{one.what} {one.size_bytes / GIB:.1f}" for one in self.terms)
        return f"{self.total_bytes / GIB:.1f} GiB of host memory locked: {parts}"


def host_ledger(embedding: int, activations: int, base: int) -> HostLedger:
    """Bytes that one rank locks.

    All ranks of a host share the base's.
    """
    terms = (
        Term("activations", activations, ("forward", "backward")),
        Term("embedding", embedding, PHASES),
        Term("the base, once a host", base, PHASES),
    )
    return HostLedger(tuple(term for term in terms if term.size_bytes))


def spare_bytes(root: Path = Path("/")) -> int:
    """Bytes that this machine can give all ranks of a run, page-locked.

    Raises ValueError naming memory.host_gib where the system does not say.
    """
    found = [available_bytes(root), *cgroup_bytes(root)]
    least = min(found)
    return max(0, int(least - max(RESERVE_GIB * GIB, RESERVE_SHARE * least)))


def available_bytes(root: Path = Path("/")) -> int:
    """MemAvailable of /proc/meminfo."""
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii", errors="replace").splitlines()
        words = next(line.split() for line in lines if line.startswith("MemAvailable:"))
        return int(words[1]) * 1024
    except (OSError, StopIteration, IndexError, ValueError) as error:
        raise ValueError(
            "memory.host_gib = auto: /proc/meminfo does not say what memory is available; set "
            "memory.host_gib to the GiB that a rank may take"
        ) from error


def cgroup_bytes(root: Path = Path("/")) -> Iterator[int]:
    """Bytes that each cgroup of this process still allows.

    Page cache counts as free.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return  # a system without cgroups
    for line in lines:
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if number == "0":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        # In a container the path may be the host's: a part that is missing has no limit to read.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            left = _left(top.joinpath(*parts[:depth]), *names)
            if left is not None:
                yield left


def _left(group: Path, limit: str, usage: str, prefix: str) -> int | None:
    """Bytes that one cgroup still allows; None without a limit."""
    most, used = _number(group / limit), _number(group / usage)
    if most is None or used is None or most >= UNLIMITED:
        return None
    try:
        stat = dict(
            line.split(" ", 1) for line in (group / "memory.stat").read_text().splitlines() if line
        )
    except (OSError, ValueError):
        stat = {}
    cache = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return max(0, most - used + cache)


def _number(file: Path) -> int | None:
    """The file's number; None if there is none, as for `max`."""
    try:
        return int(file.read_text(encoding="ascii").strip())
    except (OSError, ValueError):
        return None
