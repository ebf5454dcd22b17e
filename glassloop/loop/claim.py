"""A run's claim on its folder: one writer at a time.

Rank 0 holds it until the run is closed.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from glassloop.config import Config
from glassloop.disk.lock import FolderLock, hold
from glassloop.disk.opening import read_plain
from glassloop.formula.dist import all_or_none
from glassloop.saved.resuming import find_checkpoint, sums_of

ASKED_AND_PLANNED = ("config.yaml", "plan.json")  # a resumed run rewrites them if they change


def digests_of(folder: Path) -> dict[str, str]:
    """SHA-256 by name of the files that define a run.

    "" for a missing file.
    """
    found = {}
    for name in ASKED_AND_PLANNED:
        there = os.path.lexists(folder / name)
        found[name] = hashlib.sha256(read_plain(folder / name)).hexdigest() if there else ""
    return found


def claim(
    folder: Path,
    config: Config,
    sums: str,
    digests: Mapping[str, str],
    *,
    rank: int,
) -> FolderLock | None:
    """Lock the run's folder on rank 0.

    All ranks take part, and all raise if it fails. Other ranks write nothing but their position,
    and end with rank 0.

    Args:
        sums: of the checkpoint that the run resumes from (sums_of), before it was read.
        digests: of the run's files, taken before they were read; {} for a new run.

    Raises:
        ValueError: another process writes there, or has just saved a newer checkpoint or rewritten
            a file that this start has read.
        OSError: the folder cannot be written.
    """
    lock = None
    try:
        with all_or_none(f"locking {folder}"):
            if rank == 0:
                lock = hold(folder, lambda line: print(line, file=sys.stderr, flush=True))
                now = digests_of(folder) if digests else {}
                changed = [f"rewrote {name}" for name in digests if now[name] != digests[name]]
                if sums_of(find_checkpoint(config)[0]) != sums:
                    changed.append("saved another checkpoint")
                if changed:
                    raise ValueError(
                        f"resume.run = {folder}: its earlier process {' and '.join(changed)} "
                        "while this one started. Start it again"
                    )
    except BaseException:
        release(lock)
        raise
    return lock


def release(lock: FolderLock | None) -> None:
    """Give the folder back, on the rank that holds it."""
    if lock is not None:
        lock.release()
