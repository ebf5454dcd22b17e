"""Entries of the cache, their use, and their removal.

An entry is a folder that `published` made, or that a library fills. Names in the cache may be a
stranger's: everything happens relative to opened folders, links are not followed, and nothing
outside of the cache is touched.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from glassloop.disk.cache import ABANDONED_S, MARK, TAG
from glassloop.disk.lock import NO_LOCKS
from glassloop.disk.opening import read_plain

KINDS = ("bases", "rows", "kernels", "unfinished", "other")
REMOVABLE = KINDS[:-1]
FOLDERS = {
    "layers": "bases",
    "quantized": "bases",
    "rows": "rows",
    "kernels": "kernels",
    "unsloth_compiled": "kernels",
}
TOP = {"random-": "bases", "smollm2-": "bases"}  # folders of the cache itself, by their beginning
NO_ENTRIES = ("CACHEDIR.TAG", "file_hashes.json")
NOT_OURS = (errno.EPERM, errno.EACCES, errno.EROFS)
JUST_S = 120.0  # since a last use: a process may be reading what it does not lock
ROOT = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC  # the user's own word: a link may lead there
FOLDER = ROOT | os.O_NOFOLLOW
FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True)
class Entry:
    """One thing in the cache.

    Attributes:
        kind: of KINDS.
        parent: name of its folder in the cache; "" for the cache itself.
        size_bytes: on the disk, all of its files.
        used: seconds since 1970, the newest use or change.
        kept: why it is not removed; "" if it may be.
    """

    kind: str
    parent: str
    name: str
    size_bytes: int
    used: float
    kept: str = ""


def share(descriptor: int) -> None:
    """Mark an opened file or folder as in use.

    The use is noted for `entries`. The mark lasts while the descriptor or a mapping of it lives.
    A disk without locks marks nothing. Raises ValueError if it is being removed.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            "the cache: `glassloop cache --remove` is removing what is to be read: start again"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    now, found = time.time_ns(), os.fstat(descriptor)
    changed = now if stat.S_ISDIR(found.st_mode) else found.st_mtime_ns
    try:
        os.utime(descriptor, ns=(now, changed))
    except OSError as error:
        if error.errno not in NOT_OURS:  # another user's file or a read-only disk: no note of it
            raise


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Keep an entry of the cache while the block reads it."""
    with _opened(os.open(folder, ROOT)) as descriptor:
        share(descriptor)
        yield


def entries(root: Path) -> list[Entry]:
    """All entries of a cache, by kind and then the largest first.

    Raises ValueError for a folder that is no cache of glassloop: its files are somebody's.
    """
    if not root.exists():
        return []
    tag = root / "CACHEDIR.TAG"
    try:
        said = read_plain(tag, 4096).decode("utf-8", "replace")
    except (OSError, ValueError):
        said = ""
    if not said.startswith(TAG) or MARK not in said:
        raise ValueError(
            f"model.cache_dir: {root} is no cache of glassloop (its CACHEDIR.TAG does not say so): "
            "name another folder with --cache-dir"
        )
    found: list[Entry] = []
    with _opened(os.open(root, ROOT)) as top:
        for one in sorted(os.scandir(top), key=lambda one: one.name):
            if one.name in NO_ENTRIES:
                continue
            if one.name in FOLDERS and one.is_dir(follow_symlinks=False):
                found += _inside(top, one.name)
                continue
            kind = next(
                (kind for start, kind in TOP.items() if one.name.startswith(start)), "other"
            )
            found.append(_entry(top, "", one.name, kind))
    return sorted(found, key=lambda one: (KINDS.index(one.kind), -one.size_bytes, one.name))


def _inside(top: int, parent: str) -> list[Entry]:
    with _opened(os.open(parent, FOLDER, dir_fd=top)) as folder:
        names = sorted(one.name for one in os.scandir(folder))
        return [_entry(folder, parent, name, FOLDERS[parent]) for name in names]


def _entry(folder: int, parent: str, name: str, kind: str) -> Entry:
    """Look at one name in an opened folder."""
    found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if name.startswith("."):
        kind = "unfinished" if parent or kind == "bases" else "other"
    if stat.S_ISLNK(found.st_mode):
        return Entry(kind, parent, name, 0, found.st_mtime, "it is a link, which is not followed")
    if not stat.S_ISDIR(found.st_mode):
        used = max(found.st_mtime, found.st_atime)
        why = "" if stat.S_ISREG(found.st_mode) else "it is neither a file nor a folder"
        return Entry(kind, parent, name, found.st_blocks * 512, used, why or _other(kind))
    size, used = found.st_blocks * 512, found.st_mtime  # its atime is that of our own look
    for _, _, files, opened in os.fwalk(name, dir_fd=folder, follow_symlinks=False):
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                one = os.stat(file, dir_fd=opened, follow_symlinks=False)
                size += one.st_blocks * 512
                if stat.S_ISREG(one.st_mode):  # a link's times tell of our own look
                    used = max(used, one.st_mtime, one.st_atime)
    why = _other(kind) or _held(folder, name)
    age = time.time() - used
    if kind == "unfinished" and age < ABANDONED_S:
        why = why or "it may be in the making (a day must pass)"
    return Entry(kind, parent, name, size, used, why or ("just used" if age < JUST_S else ""))


def _other(kind: str) -> str:
    return "glassloop did not make it" if kind == "other" else ""


def remove(root: Path, entry: Entry) -> str:
    """Remove an entry; returns why it stays, "" if it is gone.

    It first gets another name, so that nobody finds a part of it.
    """
    if entry.kept:
        return entry.kept
    with (
        _opened(os.open(root, ROOT)) as top,
        _opened(os.open(entry.parent or ".", FOLDER, dir_fd=top)) as folder,
    ):
        return _remove(folder, entry.name)


def _remove(folder: int, name: str) -> str:
    locks: list[int] = []
    try:
        if why := _held(folder, name, locks):
            return why
        aside = f".removed.{secrets.token_hex(8)}"
        os.rename(name, aside, src_dir_fd=folder, dst_dir_fd=folder)
        if stat.S_ISDIR(os.stat(aside, dir_fd=folder, follow_symlinks=False).st_mode):
            shutil.rmtree(aside, dir_fd=folder)
        else:
            os.unlink(aside, dir_fd=folder)
    except OSError as error:
        return f"it cannot be removed ({error.strerror or error})"
    finally:
        for lock in locks:
            os.close(lock)
    return ""


def _held(folder: int, name: str, locks: list[int] | None = None) -> str:
    """Why an entry counts as in use; "" if nobody uses it.

    Args:
        locks: gets the descriptors of exclusive locks on the entry and its files, for the caller
            to close; None: they are given back at once.
    """
    mine: list[int] = [] if locks is None else locks
    try:
        mine.append(os.open(name, FILE, dir_fd=folder))
        if stat.S_ISDIR(os.fstat(mine[0]).st_mode):
            for one in os.scandir(mine[0]):
                if one.is_file(follow_symlinks=False):
                    mine.append(os.open(one.name, FILE, dir_fd=mine[0]))
        for descriptor in mine:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "in use"
    except OSError as error:
        if error.errno in NO_LOCKS:
            return "its disk has no locks, so nobody can tell whether it is in use"
        return f"it cannot be opened ({error.strerror or error})"
    finally:
        if locks is None:
            for descriptor in mine:
                os.close(descriptor)
    return ""


@contextlib.contextmanager
def _opened(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)
