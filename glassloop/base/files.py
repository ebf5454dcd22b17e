"""Checks of a base's config.json and index, before a library reads them."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PretrainedConfig

from glassloop.predict.sizes import odd_size

READ = (".safetensors", ".bin", ".json", ".model", ".jinja", ".txt")
POINTER, POINTER_BYTES = b"version https://git-lfs.github.com/spec/", 1024
CURE = "choose another model, or an undamaged copy"


class FileError(ValueError):
    """Unusable file of a base.

    The message names it, its field and the cure.
    """


def check_files(path: str, revision: str | None, folder: Path | None) -> None:
    """Check the sizes in config.json, and the file names of an index.

    A name must lie in the folder.

    Args:
        path: hub id or folder, as from_pretrained takes it. revision: of a hub id.
        folder: the local folder; None: a hub id, whose index the hub's library resolves.

    Raises:
        FileError: names the file, its field, and the cure.
    """
    values, _ = PretrainedConfig.get_config_dict(path, revision=revision)
    if (odd := odd_size(values)) is not None:
        raise FileError(f"config.json says {odd}; {CURE}")
    for index in sorted(folder.glob("*.index.json")) if folder is not None else ():
        names_of_index(index)


def names_of_index(index: Path) -> dict[str, str]:
    """Tensor -> file name of an index.

    Raises:
        FileError: a name leads out of the folder.
    """
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileError(f"{index.name} cannot be read ({error!r}): {CURE}") from error
    if not isinstance(found, dict):
        raise FileError(f"{index.name} has no weight_map of names: {CURE}")
    for file in found.values():
        if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts:
            raise FileError(f"{index.name} names {file!r}, which lies elsewhere: {CURE}")
    return found


def check_no_pointers(folder: Path) -> None:
    """Raise FileError for a Git LFS pointer in place of a file."""
    for file in sorted(folder.iterdir()):
        if file.suffix not in READ or not file.is_file() or file.stat().st_size > POINTER_BYTES:
            continue
        if file.read_bytes().startswith(POINTER):
            raise FileError(
                f"{file.name} is a Git LFS pointer, not the file itself: "
                f"type `git lfs pull` in {folder}"
            )
