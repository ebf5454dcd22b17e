"""The cache of what glassloop makes once: models and tokenised rows.

Its folders are large, and several processes may make the same one at a time.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from glassloop.disk.publish import sync

TAG = "Signature: 8a477f597d28d172789f06886806bc55"
MARK = "Models and rows that glassloop made"  # in the tag of its own caches
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room: on the disk, in a quota, in a file
ABANDONED_S = 24 * 3600.0  # a temporary folder of this age belongs to a process that died


def named_root(cache_dir: str | None) -> Path:
    """The path of `cache_root`, where nothing is made."""
    asked = cache_dir or os.environ.get("GLASSLOOP_CACHE") or "~/.cache/glassloop"
    return Path(asked).expanduser().absolute()


def cache_root(cache_dir: str | None) -> Path:
    """Return model.cache_dir, else $GLASSLOOP_CACHE, else ~/.cache/glassloop.

    The folder and its CACHEDIR.TAG (https://bford.info/cachedir/) are made if they are missing. It
    need not be writable: what another user or an administrator has made is read.
    """
    root = named_root(cache_dir)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(root, error) from error
    tag = root / "CACHEDIR.TAG"
    if not tag.exists() and os.access(root, os.W_OK):  # another's cache may be read-only
        with contextlib.suppress(OSError):  # for backup tools alone; a full disk is told by models
            tag.write_text(f"{TAG}\n# {MARK}; it makes them again if they are gone.\n")
    return root


def _unwritable(folder: Path, error: OSError) -> ValueError:
    if error.errno in FULL:
        return ValueError(
            f"model.cache_dir: the cache {folder} has no room ({error.strerror}): free space or "
            "raise the quota there, or set model.cache_dir or GLASSLOOP_CACHE to a larger disk"
        )
    return ValueError(
        f"model.cache_dir: the cache {folder} cannot be written ({error.strerror or error}): set "
        "model.cache_dir or GLASSLOOP_CACHE to a folder of your own"
    )


@contextmanager
def published(
    folder: Path, unwritable: Callable[[Path, OSError], Exception] = _unwritable
) -> Iterator[Path]:
    """A temporary folder that is renamed to `folder` when the block ends.

    So `folder` exists whole or not at all. If two writers race, the first rename wins, and the
    other's copy is deleted.

    Args:
        unwritable: the error to raise if no folder can be made in `folder.parent`, or if it has no
            room. It gets that folder and what the disk said.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for leftover in folder.parent.glob(f".{folder.name}.*"):
            with contextlib.suppress(FileNotFoundError):  # renamed or removed by its writer
                if time.time() - leftover.stat().st_mtime > ABANDONED_S:
                    shutil.rmtree(leftover, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise unwritable(folder.parent, error) from error
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        temporary.chmod(0o755)  # mkdtemp makes it private
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        if (full := _full(error)) is None:
            raise
        raise unwritable(folder.parent, full) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _full(error: OSError | SafetensorError) -> OSError | None:
    """The error as an OSError if a disk or quota is full.

    None for any other error.
    """
    if isinstance(error, OSError):
        number = error.errno
    else:  # safetensors gives the system's number in its text alone
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = int(found[1]) if found else None
    return OSError(number, os.strerror(number)) if number in FULL else None
