"""Hashes that stand for a base's files.

They are remembered, so that 16 GB are read once.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

from glassloop.base.random import PREFIX, VERSION
from glassloop.base.source import BaseError, BaseSource

WEIGHT_FILES = ("*.safetensors", "*.bin")  # the first kind that is there, as transformers chooses


def base_hash(source: BaseSource, memo: Path) -> str:
    """64 hex digits that stand for the base's config and weights.

    Hub: of name and commit, since a commit is itself a hash of all its files. Drawn weights: of
    their name and version. Local folder: of the files' bytes, remembered in the file `memo`, so
    that 16 GB are read once. A file counts as the same while path, size, inode and both of its
    times are; the system sets one of them at every write.
    """
    if source.commit is not None:
        return hashlib.sha256(f"hub:{source.name}@{source.commit}".encode()).hexdigest()
    if source.drawn is not None:
        return hashlib.sha256(f"{PREFIX}{source.drawn}:{VERSION}".encode()).hexdigest()
    assert source.folder is not None
    known: dict[str, str] = _read_memo(memo)
    total, fresh = hashlib.sha256(b"folder"), dict(known)
    for file in base_files(source.folder):
        path = file.resolve()
        stat = path.stat()
        key = f"{path}|{stat.st_size}|{stat.st_ino}|{stat.st_mtime_ns}|{stat.st_ctime_ns}"
        if key not in fresh:
            fresh = {old: one for old, one in fresh.items() if not old.startswith(f"{path}|")}
            with open(path, "rb") as handle:
                fresh[key] = hashlib.file_digest(handle, "sha256").hexdigest()
        total.update(f"{file.name}:{fresh[key]}\n".encode())
    if fresh != known:
        _write_memo(memo, fresh)
    return total.hexdigest()


def base_files(folder: Path) -> list[Path]:
    """config.json and the weight files that transformers would read from a folder."""
    weights = next((found for kind in WEIGHT_FILES if (found := sorted(folder.glob(kind)))), [])
    if not weights:
        raise BaseError(
            f"model.id = {folder} holds no weights (*.safetensors or *.bin): name the folder that "
            "save_pretrained wrote"
        )
    return [folder / "config.json", *weights]


def _read_memo(memo: Path) -> dict[str, str]:
    try:
        known = json.loads(memo.read_text())
    except (OSError, ValueError):
        known = {}  # only a memory of hashes: without it they are computed again
    return known if isinstance(known, dict) else {}


def _write_memo(memo: Path, hashes: dict[str, str]) -> None:
    """Remember hashes if the cache can be written.

    Another user's cache, a read-only one or a full one cannot.
    """
    try:
        descriptor, temporary = tempfile.mkstemp(dir=memo.parent, prefix=f".{memo.name}.")
    except OSError:
        return
    try:
        with os.fdopen(descriptor, "w") as handle:
            json.dump(hashes, handle, indent=1)
        os.chmod(temporary, 0o644)  # mkstemp makes it private, and the next user could not read it
        os.replace(temporary, memo)
    except OSError:  # without it the hashes are computed again
        os.unlink(temporary)
