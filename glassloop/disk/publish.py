"""Publish folders and files whole or not at all.

A published folder holds a sum of every file.

They are written and synced under a hidden name, renamed, and the parent is synced. So a published
name is complete, whenever the process died. A folder's sums lie in SHA256SUMS, which
`sha256sum -c SHA256SUMS` reads too. A folder is read only where its sums are right.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from glassloop.disk.opening import (
    NotPlain,
    read_plain,
    require_plain_entries,
    require_plain_folder,
)

SUMS = "SHA256SUMS"
MEMORY_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # no larger file is read
IN_A_RUN = ("checkpoints", "capsules")  # folders of a run that hold published ones
REPLACED = (
    ".replaced"  # suffix of a folder that stood where a new one of the same name is being put
)
# No separator, no dot in front: it cannot leave its folder.
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class NotSaved(OSError):
    """The disk refused a folder.

    Nothing was published and nothing older was removed, so a run may continue.
    """


def publish(
    target: Path,
    contents: Mapping[str, bytes],
    *,
    limit: str,
    also: Callable[[Path], None] | None = None,
) -> None:
    """Publish the folder `target`.

    It holds `contents` (file name -> bytes) and what `also` writes into the folder that it is
    given.

    The last of `contents` is the last in the sums: a reader that requires it notices a list that
    was cut short. A folder that has the name is moved aside (suffix .replaced), and stays whole
    there until the caller removes it.

    Args:
        limit: the config field that says how many such folders are kept; a full disk's message
            names it.

    Raises:
        NotSaved: names the folder, what the disk said, and the cure.
    """
    work = target.with_name(f".{target.name}.writing")
    try:
        require_plain_folder(target.parent)
        make(target.parent)
        _discard(work)  # left by a process that died here
        work.mkdir()
        if also is not None:
            also(work)
        others = sorted(work.iterdir())
        for path in others:
            sync(path)
        for name, data in contents.items():
            _write(work / name, data)
        names = [*[path.name for path in others], *contents]
        assert all(PLAIN_NAME.fullmatch(name) for name in names), (
            f"names that could not be read back: {names}"
        )
        _write(
            work / SUMS,
            "".join(f"{_digest((work / name).read_bytes())}  {name}\n" for name in names).encode(),
        )
        sync(work)
        if os.path.lexists(target):
            aside = target.with_name(target.name + REPLACED)
            if os.path.lexists(aside):
                remove(aside)
            os.rename(target, aside)
        os.rename(work, target)
        sync(target.parent)
    except NotPlain as error:
        raise NotSaved(f"{target} was not saved: {error}") from error
    except OSError as error:
        raise NotSaved(f"{target} was not saved: {error}; {cure(error, limit)}") from error
    finally:
        if work.exists():
            shutil.rmtree(work, ignore_errors=True)


def make(folder: Path) -> None:
    """Make a folder and its missing parents, durably."""
    if not folder.is_dir():
        make(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def replace_file(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace a file whole.

    After a kill at any moment, `path` holds the old bytes or the new.

    Args:
        durable: the same after a loss of power, for the price of two calls of fsync.
    """
    work = path.with_name(f".{path.name}.{os.getpid()}.writing")
    work.unlink(missing_ok=True)
    try:
        _write(work, data, durable=durable)
        os.rename(work, path)
    finally:
        work.unlink(missing_ok=True)
    if durable:
        sync(path.parent)  # the rename itself


def write_text(path: Path, text: str) -> None:
    """Replace a file by UTF-8 text.

    An OSError names the file and the cure.

    A lone surrogate, which UTF-8 cannot hold, becomes its escape.
    """
    with named(path, "free space there, or make its folder writable"):
        replace_file(Path(path), text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON.

    Raises as `write_text`, and ValueError for a NaN or infinite number.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def named(path: Path, cure: str) -> Iterator[None]:
    """Add the file's name and the cure to an OSError."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno, f"{path} cannot be written ({error.strerror}): {cure}"
        ) from error


def remove(folder: Path) -> None:
    """Remove a published folder.

    Its name goes first, so a removal that dies leaves no torn folder under it.
    """
    doomed = folder.with_name(f".{folder.name}.removing")
    _discard(doomed)
    os.rename(folder, doomed)
    sync(folder.parent)
    _discard(doomed)


def unfinished(parent: Path) -> list[Path]:
    """List what dead processes left unfinished in `parent`."""
    return sorted(
        path
        for path in parent.glob(".*")
        if path.suffix in (".writing", ".removing") and (path.is_symlink() or path.is_dir())
    )


def read(folder: Path, required: Collection[str], only: str | None = None) -> dict[str, bytes]:
    """Read all files of a published folder, or `only` one.

    Returns bytes by name.

    Raises:
        ValueError: names the file that is missing, corrupt, cut short or not a plain file, or a
            `required` one that has no sum.
    """
    if folder.parent.name in IN_A_RUN:
        require_plain_folder(folder.parent)
    require_plain_folder(folder)
    digests: dict[str, str] = {}
    sums = _bytes(folder / SUMS)
    for line in sums.decode("utf-8", "replace").split("\n")[:-1]:
        digest, _, name = line.partition("  ")
        if (
            not re.fullmatch("[0-9a-f]{64}", digest)
            or not PLAIN_NAME.fullmatch(name)
            or name in digests
        ):
            raise ValueError(f"{SUMS} is corrupt at {line[:100]!r}")
        digests[name] = digest
    if not sums.endswith(b"\n"):
        raise ValueError(f"{SUMS} is cut short: it does not end with a line break")
    if missing := set(required) - digests.keys():
        raise ValueError(
            f"{SUMS} is corrupt or cut short: it does not list {', '.join(sorted(missing))}"
        )
    if only is None:
        require_plain_entries(folder)  # libraries open files that have no sum, too
    contents = {}
    for name in digests if only is None else [only]:
        data = _bytes(folder / name)
        if _digest(data) != digests[name]:
            raise ValueError(
                f"{name} is corrupt or cut short: its {len(data)} bytes do not have the sum in "
                f"{SUMS}"
            )
        contents[name] = data
    return contents


def sweep(parent: Path) -> None:
    """Remove what is unfinished."""
    for path in unfinished(parent):
        _discard(path)


def cure(error: OSError, limit: str) -> str:
    """Name the cure for a disk that refused a folder.

    limit: the config field that says how many such folders are kept.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"free space there, lower {limit}, or set run.dir to another disk"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "make the folder writable for this user, or set run.dir to one that is"
    return (
        "see whether the disk is healthy and the folder still there, or set run.dir to another one"
    )


def _discard(path: Path) -> None:
    """Remove a folder, a file, or a link but not its target."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _write(path: Path, data: bytes, *, durable: bool = True) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        if durable:
            os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _bytes(path: Path) -> bytes:
    try:
        return read_plain(path, MEMORY_BYTES)
    except FileNotFoundError as error:
        raise ValueError(f"{path.name} is missing") from error
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from error
