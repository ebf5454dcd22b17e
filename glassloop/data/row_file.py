"""Tokenised rows as mapped files.

They are written part by part and checked when they are opened.

A folder holds flat arrays for each side (training, held-out) and a manifest with what a Dataset
says besides its rows. The manifest lists size and SHA-256 of each array. A folder may be a
stranger's: only plain files are opened, none runs code, and what does not fit is refused.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from glassloop.data.dataset import Dataset, RowSet
from glassloop.data.facts import Facts
from glassloop.data.rows import Example
from glassloop.data.sources import Loaded, MixedPart
from glassloop.data.stored import StoredExamples, StoredRows, example_of
from glassloop.data.templates import Template
from glassloop.disk.entries import share
from glassloop.disk.opening import open_plain, read_plain, require_plain_folder

FORMAT = 1
MANIFEST = "rows.json"
SIDES = ("train", "heldout")
# Name of an array -> dtype of its numbers.
ARRAYS = {
    "tokens": "<i4",  # (T,) ids of all rows, end to end
    "supervised": "?",  # (T,)
    "lengths": "<i4",  # (R,) tokens of each row
    "cut": "?",  # (R,)
    "ids": "u1",  # UTF-8 of row ids, end to end
    "id_lengths": "<i4",  # (R,) bytes
    "untouched": "<i4",  # length of every row before any was dropped or cut, ascending
    "texts": "u1",  # JSON of the first examples, end to end
    "text_lengths": "<i4",  # (examples kept,) bytes
}


@dataclass(frozen=True)
class SideFacts:
    """What the manifest says of one side."""

    examples: int  # taken from the source, before any was left out
    dropped: tuple[str, ...] = ()
    faulty: dict[str, int] = field(default_factory=dict)
    facts: Facts = field(default_factory=Facts)


@dataclass(frozen=True)
class Manifest:
    """What a folder says besides its arrays.

    Attributes:
        loaded: Fields of Loaded, without its examples.
        telling: Examples that decide the template as all rows do.
        sums: File -> (bytes, SHA-256).
    """

    key: str
    sides: dict[str, SideFacts]
    loaded: dict[str, Any]
    telling: tuple[Example, ...]
    digest: str
    repeated: int
    heldout_repeated: int
    near_across: tuple[tuple[str, str], ...]
    sums: dict[str, tuple[int, str]]
    format: int = FORMAT


class Writer:
    """Open files of a folder that grow at their ends."""

    def __init__(self, files: dict[str, IO[bytes]]) -> None:
        self._files = files
        self._sums = {name: hashlib.sha256() for name in files}

    def add(self, side: str, arrays: dict[str, bytes]) -> None:
        """Append to the arrays of one side."""
        for name, data in arrays.items():
            self._files[f"{side}.{name}"].write(data)
            self._sums[f"{side}.{name}"].update(data)

    def sums(self) -> dict[str, tuple[int, str]]:
        return {
            name: (file.tell(), self._sums[name].hexdigest()) for name, file in self._files.items()
        }


@contextmanager
def writer(folder: Path) -> Iterator[Writer]:
    """Open the arrays of a new folder. Raises OSError."""
    with ExitStack() as stack:
        names = [f"{side}.{name}" for side in SIDES for name in ARRAYS]
        yield Writer({name: stack.enter_context(open(folder / name, "xb")) for name in names})


def write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest)), encoding="utf-8")


@dataclass(frozen=True)
class Opened:
    """A folder's contents: its arrays are mapped."""

    manifest: Manifest
    rows: dict[str, StoredRows]
    examples: dict[str, StoredExamples]
    untouched: dict[str, np.ndarray]

    def loaded(self) -> Loaded:
        told = dict(self.manifest.loaded)
        told["notes"] = tuple(told["notes"])
        told["mixed"] = tuple(MixedPart(**part) for part in told["mixed"])
        counts = {
            side: StoredExamples(np.zeros(0, np.uint8), np.zeros(0, np.int64), one.examples)
            for side, one in self.manifest.sides.items()
        }
        return Loaded(train=counts["train"], heldout=counts["heldout"], **told)

    def dataset(self, template: Template) -> Dataset:
        train, heldout = (self._side(side) for side in SIDES)
        told = self.manifest
        return Dataset(
            train,
            heldout,
            self.loaded(),
            template,
            told.digest,
            told.repeated,
            told.heldout_repeated,
            told.near_across,
        )

    def _side(self, side: str) -> RowSet:
        rows, told = self.rows[side], self.manifest.sides[side]
        return RowSet(
            rows=rows,
            examples=self.examples[side],
            dropped=told.dropped,
            cut=int(rows.cut.sum()),
            untouched_tokens=array("i", self.untouched[side].tobytes()),
            faulty=told.faulty,
            facts=told.facts,
        )


def open_rows(folder: Path, key: str) -> Opened:
    """Map a folder's arrays, each checked whole.

    Raises ValueError for what is damaged, not plain or made for another `key`; FileNotFoundError
    if there is no such folder.
    """
    os.lstat(folder)
    require_plain_folder(folder)
    try:
        manifest = _manifest(json.loads(read_plain(folder / MANIFEST)), key)
        arrays = {name: _mapped(folder / name, *manifest.sums[name]) for name in _names()}
        rows, examples, untouched = {}, {}, {}
        for side in SIDES:
            of = {name: arrays[f"{side}.{name}"] for name in ARRAYS}
            rows[side] = StoredRows(
                tokens=of["tokens"],
                supervised=of["supervised"],
                ends=_ends(of["lengths"], len(of["tokens"])),
                ids=of["ids"],
                id_ends=_ends(of["id_lengths"], len(of["ids"])),
                cut=of["cut"],
            )
            text_ends = _ends(of["text_lengths"], len(of["texts"]))
            examples[side] = StoredExamples(of["texts"], text_ends, len(rows[side]))
            untouched[side] = of["untouched"]
            counts = (len(of["supervised"]), len(of["cut"]), len(of["id_lengths"]))
            if counts != (len(of["tokens"]), len(rows[side]), len(rows[side])):
                raise ValueError(f"the arrays of {side} do not belong together")
            if len(text_ends) > len(rows[side]):
                raise ValueError(f"{side} has more texts than rows")
        return Opened(manifest, rows, examples, untouched)
    except FileNotFoundError as error:
        raise ValueError(f"{folder} lacks {Path(str(error.filename)).name}") from error
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged ({error!r})") from error


def _names() -> list[str]:
    return [f"{side}.{name}" for side in SIDES for name in ARRAYS]


def _manifest(raw: dict[str, Any], key: str) -> Manifest:
    if (raw["format"], raw["key"]) != (FORMAT, key):
        raise ValueError(f"format {raw['format']} and key {raw['key']} are others")
    sides = {}
    for side in SIDES:
        told = dict(raw["sides"][side])
        facts = dict(told.pop("facts"))
        facts["answers_spell"] = tuple(facts["answers_spell"])
        sides[side] = SideFacts(
            told["examples"], tuple(told["dropped"]), dict(told["faulty"]), Facts(**facts)
        )
    return Manifest(
        key=key,
        sides=sides,
        loaded=dict(raw["loaded"]),
        telling=tuple(map(example_of, raw["telling"])),
        digest=str(raw["digest"]),
        repeated=int(raw["repeated"]),
        heldout_repeated=int(raw["heldout_repeated"]),
        near_across=tuple((str(one), str(other)) for one, other in raw["near_across"]),
        sums={name: (int(size), str(digest)) for name, (size, digest) in raw["sums"].items()},
    )


def _mapped(path: Path, size: int, digest: str) -> np.ndarray:
    """Map a file that is as it was written."""
    dtype = np.dtype(ARRAYS[path.name.rpartition(".")[2]])
    with open(open_plain(path), "rb") as file:
        found = os.fstat(file.fileno()).st_size
        if found != size or size % dtype.itemsize:
            raise ValueError(f"{path} has {found:,} bytes, written with {size:,}")
        if not size:
            return np.zeros(0, dtype)
        share(file.fileno())  # for as long as the mapping lives
        pages = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    if hashlib.sha256(cast(Any, pages)).hexdigest() != digest:
        raise ValueError(f"{path} is damaged: its bytes are not those that were written")
    return np.frombuffer(pages, dtype)


def _ends(lengths: np.ndarray, total: int) -> np.ndarray:
    """(R,) int64: where each part ends.

    Raises ValueError unless they fill `total`."""
    ends = np.cumsum(lengths, dtype=np.int64)
    if (len(lengths) and int(lengths.min()) < 0) or (int(ends[-1]) if len(ends) else 0) != total:
        raise ValueError("parts that do not fill their array")
    return ends
