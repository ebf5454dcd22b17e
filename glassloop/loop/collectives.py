"""Which collective ranks are stuck in, from torch's flight recorder.

Each process keeps its last collectives in memory. When one rank's wait runs out, it writes them to
ranks/collectives_rank0.json; the others' watchdogs see the file and write theirs. The first rank
then reads all of them. A collective has the same number on every rank.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from glassloop.disk.opening import read_plain
from glassloop.disk.publish import replace_file

KEPT = "256"  # collectives that a process remembers; an update has about five
SIZE = "TORCH_FR_BUFFER_SIZE"
MOST_BYTES = 16 * 2**20  # of a dump
ROLES = {  # of the collectives of an update, by operation and dtype
    ("all_gather", "Double"): "the gate",
    ("all_reduce", "Float"): "the sum of gradients",
    ("broadcast", "Float"): "rank 0's norm",
}


@dataclass(frozen=True)
class Call:
    """One collective as one rank called it."""

    number: int  # counted from 1, the same on all ranks
    what: str  # "all_reduce of 1,024 float (the sum of gradients)"


@dataclass(frozen=True)
class Calls:
    """What one rank's recorder holds."""

    rank: int
    done: int  # number of the last collective that ended
    entered: dict[int, Call] = field(default_factory=dict)  # by number

    @property
    def last(self) -> int:
        return max(self.entered, default=self.done)


def record_collectives() -> None:
    """Switch the recorder on. Call it before the process group exists."""
    os.environ.setdefault(SIZE, KEPT)


def dump() -> bytes | None:
    """This process's last collectives as JSON; None if torch tells none."""
    from torch._C import _distributed_c10d as c10d

    nccl = dist.is_initialized() and "nccl" in dist.get_backend()
    names = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
    for name in names if nccl else names[::-1]:
        if (ask := getattr(c10d, name, None)) is not None:
            return ask()
    return None


def write_dump(folder: Path, rank: int) -> None:
    """Write this rank's collectives; nothing if torch or the disk refuses."""
    try:
        found = dump()
        if found is not None:
            replace_file(dump_of(folder, rank), found, durable=False)
    except (OSError, RuntimeError):
        return  # the sentence then says that this rank told nothing


def dump_of(folder: Path, rank: int) -> Path:
    return folder / f"collectives_rank{rank}.json"


def asked(folder: Path, ranks: int, since: float) -> bool:
    """Whether a rank has written its collectives since `since`."""
    return any(_is_new(dump_of(folder, rank), since) for rank in range(ranks))


def stuck_in(
    folder: Path,
    rank: int,
    ranks: int,
    since: float,
    updates: dict[int, int],
    wait_s: float,
    *,
    failed: bool = False,
) -> str:
    """Say which collective is stuck, from every rank's dump.

    Writes this rank's own first.

    Args:
        since: start of this process, in seconds of the epoch; older dumps are of another one.
        updates: the update in progress, by rank, as far as it is known.
        wait_s: longest wait for the others' files.
        failed: this rank's last collective was given up. The recorder counts it as ended.

    Returns:
        A sentence with a blank before it; empty if the recorder tells nothing.
    """
    write_dump(folder, rank)
    own = calls_of(folder, rank)
    if own is None or not own.entered:
        return ""
    until = time.monotonic() + wait_s
    others = [dump_of(folder, one) for one in range(ranks)]
    while time.monotonic() < until and not all(_is_new(one, since) for one in others):
        time.sleep(0.1)
    told = {one: calls_of(folder, one) for one in range(ranks) if _is_new(others[one], since)}
    if failed:
        told[rank] = replace(own, done=min(own.done, own.last - 1))
    said = sentence([one for one in told.values() if one is not None], ranks, updates)
    return f" {said}." if said else ""


def calls_of(folder: Path, rank: int) -> Calls | None:
    """Read a rank's dump; None if it is absent or damaged."""
    try:
        return parsed(json.loads(read_plain(dump_of(folder, rank), MOST_BYTES)), rank)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def parsed(value: Any, rank: int) -> Calls:
    """The collectives of the default process group in a dump.

    gloo's threads may write the number of the last one that ended out of order; an entry that is
    retired has ended all the same.

    Raises KeyError, TypeError, ValueError or AttributeError for another shape.
    """
    calls = {}
    done = int(value["pg_status"]["0"]["last_completed_collective"])
    for entry in value["entries"]:
        if int(entry["pg_id"]) == 0 and not entry["is_p2p"]:
            number = int(entry["collective_seq_id"])
            calls[number] = Call(number, in_words(entry))
            if entry["state"] == "completed" or entry.get("retired") is True:
                done = max(done, number)
    return Calls(rank, done, calls)


def in_words(entry: dict[str, Any]) -> str:
    """A recorded collective in words: operation, size, dtype, role in an update."""
    operation = str(entry["profiling_name"]).rpartition(":")[2][:40]
    size = sum(_product(one) for one in entry["input_sizes"])
    dtype = str((entry["input_dtypes"] or ["?"])[0])[:20]
    role = ROLES.get((operation, dtype))
    return f"{operation} of {size:,} {dtype.lower()}{f' ({role})' if role else ''}"


def sentence(told: Sequence[Calls], ranks: int, updates: dict[int, int]) -> str:
    """Say which collective is stuck and who entered it.

    Empty without dumps.
    """
    if not told:
        return ""
    number = min(calls.done for calls in told) + 1
    entered = [calls for calls in told if number in calls.entered]
    missing = [calls for calls in told if calls.last < number]
    silent = sorted(set(range(ranks)) - {calls.rank for calls in told})
    kinds = {calls.entered[number].what for calls in entered}
    if not entered:
        return f"No rank is inside a collective: the last one that ended is number {number - 1}"
    parts = []
    if len(kinds) > 1:
        parts = [
            f"rank {calls.rank} is in {calls.entered[number].what}{_of(calls, updates)}"
            for calls in entered
        ]
        lead = f"The ranks disagree about collective {number}: "
    else:
        lead = f"Stuck in collective {number}, {kinds.pop()}{_of(entered[0], updates)}: "
        parts = [f"entered by rank {_names(entered)}"]
    for calls in missing:
        last = calls.entered.get(calls.last)
        after = f"; its last was {calls.last}, {last.what}" if last else ""
        parts.append(f"not by rank {calls.rank}{after}")
    if silent:
        parts.append(f"rank {', '.join(map(str, silent))} does not answer")
    return lead + ", ".join(parts)


def _of(calls: Calls, updates: dict[int, int]) -> str:
    return f" of update {updates[calls.rank]}" if calls.rank in updates else ""


def _names(calls: Sequence[Calls]) -> str:
    return ", ".join(str(one.rank) for one in calls)


def _product(sizes: Sequence[int]) -> int:
    found = 1
    for size in sizes:
        found *= int(size)
    return found


def _is_new(path: Path, since: float) -> bool:
    try:
        return path.lstat().st_mtime >= since
    except OSError:
        return False
