"""Open files of a run's folder, plain ones alone.

A run's folder may come from a stranger. A link in it would lead reads and writes elsewhere, a FIFO
would wait for ever, a device has no end. So whatever lies inside of a run's folder is opened here.
The folder itself may be reached through a link: its path is the user's own word.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

MOST_BYTES = 256 * 2**20  # of a file that is read whole
KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISLNK, "a link"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISREG, "a file"),
)
CURE = "Remove it, or put a copy in its place"


class NotPlain(ValueError):
    """A link, FIFO or device has a file's name.

    It was neither read nor written.
    """


def open_plain(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a plain file and return its descriptor.

    Raises:
        NotPlain: there is something else under that name; a folder counts as something else.
        OSError: as os.open; FileNotFoundError where there is nothing.
    """
    try:
        file = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise _not_plain(path, os.lstat(path).st_mode, "a plain file") from None
        raise
    mode = os.fstat(file).st_mode
    if not stat.S_ISREG(mode):
        os.close(file)
        raise _not_plain(path, mode, "a plain file")
    return file


def read_plain(path: Path, most: int = MOST_BYTES) -> bytes:
    """Read a plain file whole.

    Raises as `open_plain`, and ValueError for more than `most` bytes.
    """
    with open(open_plain(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(
                f"{path} has {size:,} bytes, and a file of its kind has {most:,} at most: "
                "put an undamaged copy in its place"
            )
        return file.read(size)


def require_plain_folder(folder: Path) -> None:
    """Raise NotPlain if `folder` is a link or no folder."""
    try:
        mode = os.lstat(folder).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        raise _not_plain(folder, mode, "a plain folder")


def require_plain_entries(folder: Path) -> None:
    """Raise NotPlain if `folder` holds a link, FIFO or device."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        mode = entry.stat(follow_symlinks=False).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise _not_plain(Path(entry.path), mode, "a plain file")


def _not_plain(path: Path, mode: int, wanted: str) -> NotPlain:
    found = next((words for test, words in KINDS if test(mode)), "a device")
    return NotPlain(f"{path} is {found}, not {wanted}: it was not followed. {CURE}")
