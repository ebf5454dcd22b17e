"""A run's claim on its folder: one writer at a time.

Rank 0 holds it until the run is closed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from glassloop.config import Config
from glassloop.disk.lock import FolderLock, hold
from glassloop.formula.dist import all_or_none
from glassloop.saved.resuming import find_checkpoint


def claim(folder: Path, config: Config, checkpoint: Path | None, *, rank: int) -> FolderLock | None:
    """Lock the run's folder on rank 0.

    All ranks take part, and all raise if it fails.

    Other ranks write nothing but their position, and end with rank 0.

    Args:
        checkpoint: that the run resumes from, found before the folder was locked.

    Raises:
        ValueError: another process writes there, or has just saved a newer checkpoint.
        OSError: the folder cannot be written.
    """
    lock = None
    try:
        with all_or_none(f"locking {folder}"):
            if rank == 0:
                lock = hold(folder, lambda line: print(line, file=sys.stderr, flush=True))
                if find_checkpoint(config)[0] != checkpoint:
                    raise ValueError(
                        f"resume.run = {folder}: its earlier process saved another checkpoint "
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
