"""Open files of a run's folder, plain ones alone.

A run's folder may come from a stranger. A link in it would lead reads and writes elsewhere, a FIFO
would wait for ever, a device has no end. A hard link shares its bytes with a file elsewhere, so it
is read but never written. Whatever lies inside of a run's folder is opened here. The folder itself
may be reached through a link: its path is the user's own word.
"""

from __future__ import annotations

import errno
import os
import shlex
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
    """A file's name leads to something else, or to shared bytes.

    It was neither read nor written.
    """


def open_plain(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a plain file and return its descriptor.

    Raises:
        NotPlain: something else has that name, such as a folder; or the file is to be written and
            has another name too.
        OSError: as os.open; FileNotFoundError if there is nothing.
    """
    safe = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = os.open(path, flags & ~os.O_TRUNC | safe, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise _not_plain(path, os.lstat(path).st_mode, "a plain file") from None
        raise
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode):
        os.close(file)
        raise _not_plain(path, found.st_mode, "a plain file")
    if flags & (os.O_WRONLY | os.O_RDWR) and found.st_nlink > 1:
        os.close(file)
        here, copy = shlex.quote(str(path)), shlex.quote(f"{path}.own")
        raise NotPlain(
            f"{path} is a hard link: its bytes have {found.st_nlink} names, and a write would "
            f"change them under each. It was not written. Give it bytes of its own: "
            f"cp {here} {copy} && mv {copy} {here}"
        )
    if flags & os.O_TRUNC:  # only now: the others under its names keep their bytes
        os.ftruncate(file, 0)
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
