"""Rows of `data.source`: files, a folder, a hub id or the sample.

Whatever it is, its files are read one by one in the order of their names, and their rows follow
each other. A row's number counts over all of them.
"""

from __future__ import annotations

import bisect
import difflib
import glob
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glassloop.config import DataConfig
from glassloop.data.arrow_files import read_arrow
from glassloop.data.folders import KINDS, choose, data_files, kind_of, refuse_outside, seen
from glassloop.data.hub import open_repository
from glassloop.data.library import arrow_files
from glassloop.data.names import listed, shown
from glassloop.data.text_files import (
    LFS,
    PACKED,
    Rows,
    check_file,
    read_csv,
    read_json,
    read_jsonl,
)

SAMPLE = Path(__file__).resolve().parents[2] / "data" / "calls.jsonl"
READERS: dict[str, Callable[[Path, str, str, int], Rows]] = {
    "csv": read_csv,
    "json": read_json,
    "jsonl": read_jsonl,
    "arrow": read_arrow,
}
SPLIT = re.compile(r"([\w.-]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")


@dataclass(frozen=True)
class Source:
    """Rows of one source as its files write them."""

    columns: tuple[str, ...]
    rows: Sequence[dict[str, Any]]
    split: str  # first part of row ids
    name: str  # for messages
    files: tuple[str, ...]  # that were read, in order
    ends: tuple[int, ...]  # number of rows up to the end of each file
    notes: tuple[str, ...] = ()  # what a person should know of how it was read
    first: int = 0  # number of the first row, where data.split takes a part

    def where(self, index: int) -> str:
        """The place of a row, for messages: file and number within it."""
        if len(self.files) == 1:
            return f"{self.name}, row {index + self.first}"
        at = bisect.bisect_right(self.ends, index + self.first)
        return f"{self.files[at]}, row {index + self.first - ((0, *self.ends)[at])}"


Part = tuple[str | None, str | None]  # start and stop of a slice, as written


@dataclass(frozen=True)
class Found:
    """Files of one source, before they are read."""

    paths: tuple[Path, ...]
    names: tuple[str, ...]  # of the files, for messages
    split: str
    label: str  # for messages
    part: Part = (None, None)
    notes: tuple[str, ...] = ()


def open_source(data: DataConfig, place: str, split: str, field: str) -> Source:
    """Read all rows of `place`.

    `field`: the config field that named it. Raises ValueError.
    """
    return read_source(find_source(data, place, split, field), data, place, field)


def find_source(data: DataConfig, place: str, split: str, field: str) -> Found:
    """Find the files of `place`; those of a hub id are fetched.

    `field`: the config field that named it. Raises ValueError.
    """
    said = f"{field} = {place}"
    path = SAMPLE if place == "sample" else Path(place).expanduser()
    if place == "sample" and not path.is_file():
        raise ValueError(
            f"{said}: {path} is missing; the sample lies in a checkout: use one (pip install -e .)"
        )
    if path.is_dir():
        return _folder(path, data, place, split, field)
    if not names_files(place) and not path.exists():
        try:
            return _hub(data, place, split, field)
        except ValueError as error:
            if not (near := near_file(path)):
                raise
            raise ValueError(f"{error}; no file has this name{near}") from error
    if field == "data.source" and split != "train":
        raise ValueError(
            f"data.split = {split}: {said} names files, which have no splits; leave data.split out"
        )
    paths = [path] if place == "sample" or path.exists() else _paths(place, said)
    label = place if len(paths) == 1 else f"{len(paths)} files"
    names = [place] if len(paths) == 1 else [str(path) for path in paths]
    return Found(tuple(paths), tuple(names), split, label)


def read_source(found: Found, data: DataConfig, place: str, field: str) -> Source:
    """Read the rows of files. Raises ValueError, also for no rows."""
    limit = int(data.max_gib * 2**30)
    source = _read(found.paths, found.names, found.split, found.label, field, limit)
    source = _sliced(source, found.part, found.notes)
    if not len(source.rows):
        raise ValueError(f"{field} = {place}: {source.name} has no rows")
    return source


def names_files(place: str) -> bool:
    """True for the sample, files that hold rows by name, and patterns."""
    each = map(str.strip, place.split(","))
    return place == "sample" or all(kind_of(name) or set(name) & set("*?[") for name in each)


def near_file(path: Path) -> str:
    """Name the file beside `path` whose name is nearest; empty without one."""
    try:
        names = [one.name for one in path.parent.iterdir() if kind_of(one.name)]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
    return f"; did you mean {shown(str(path.parent / near[0]))}?" if near else ""


def _paths(place: str, said: str) -> list[Path]:
    """The files of a list with commas, patterns filled in."""
    paths: dict[Path, None] = {}
    for name in map(str.strip, place.split(",")):
        path = Path(name).expanduser()
        found = [path] if path.exists() else [Path(one) for one in glob.glob(str(path))]
        if not found:
            one = f"no file matches {name}" if set(name) & set("*?[") else "there is no such file"
            which = f": {name}" if name != place and not set(name) & set("*?[") else ""
            raise ValueError(f"{said}: {one}{which} (looked in {Path.cwd()}){near_file(path)}")
        paths.update(dict.fromkeys(sorted(found)))
    return list(paths)


def _read(
    paths: Sequence[Path], names: Sequence[str], split: str, label: str, field: str, limit: int
) -> Source:
    """Rows of files one after the other.

    Raises ValueError for tables with unequal columns.
    """
    columns: dict[str, None] = {}
    rows: list[dict[str, Any]] = []
    ends: list[int] = []
    first: tuple[str, ...] | None = None
    for path, name in zip(paths, names, strict=True):
        kind = kind_of(path.name)
        if kind is None:
            endings = ", ".join(KINDS)
            raise ValueError(
                f"{field} = {name}: a file must end in {endings}, not {path.suffix or 'nothing'}"
                + (f" (text also {', '.join(PACKED)})" if path.suffix in PACKED else "")
            )
        found, more = READERS[kind](path, name, field, limit)
        if more and kind in ("csv", "arrow"):
            first = first or found
            if set(found) != set(first):
                raise ValueError(
                    f"{field} = {name}: it has columns {listed(found)}, but {names[0]} has "
                    f"{listed(first)}; files that are read together need equal columns"
                )
        limit -= path.stat().st_size
        columns.update(dict.fromkeys(found))
        rows += more
        ends.append(len(rows))
    return Source(tuple(columns), rows, split, label, tuple(names), tuple(ends))


def _folder(folder: Path, data: DataConfig, place: str, split: str, field: str) -> Found:
    said = f"{field} = {place}"
    name, part = _part(split, said)
    if (folder / "dataset_dict.json").is_file():  # datasets.DatasetDict.save_to_disk
        if not _inside(folder, name) or not (folder / name / "state.json").is_file():
            there = sorted(path.parent.name for path in folder.glob("*/state.json"))
            raise ValueError(
                f"{said} has no split {shown(name)}; it has {listed(there)}: set data.split"
            )
        folder, named = folder / name, _saved(folder / name, said)
    elif (folder / "state.json").is_file():  # datasets.Dataset.save_to_disk
        if name != "train":
            raise ValueError(f"data.split = {split}: {said} is one split; leave data.split out")
        named = _saved(folder, said)
    else:
        names = [
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
        ]
        readme = folder / "README.md"
        text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else None
        if not data_files(names):
            refuse_outside(text, said)
            _members(folder, seen(names), split, place, field)
            return _by_datasets(place, names, data, split, said)
        chosen = choose(names, text, data.config, name, said)
        notes = _notes(chosen.files, chosen.others)
        return replace(_members(folder, chosen.files, split, place, field), part=part, notes=notes)
    return replace(_members(folder, named, split, place, field), part=part)


def _members(folder: Path, names: Sequence[str], split: str, place: str, field: str) -> Found:
    """Files within a folder; refuses links that lead out."""
    for name in names:
        if not _inside(folder, name):
            raise ValueError(
                f"{field} = {place}: {shown(name)} leads to {(folder / name).resolve()}, outside "
                "the folder; only files inside it are read. Name that file itself as data.source"
            )
    shown_names = tuple(f"{place.rstrip('/')}/{shown(name)}" for name in names)
    paths = tuple(folder / name for name in names)
    return Found(paths, shown_names, split, f"{place} ({split})")


def _inside(folder: Path, name: str) -> bool:
    return (folder / name).resolve().is_relative_to(folder.resolve())


def _notes(files: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    read = f"files read: {listed(files, 5)}"
    return (read + (f"; of another kind and not read: {listed(others, 5)}" if others else ""),)


def _saved(folder: Path, said: str) -> tuple[str, ...]:
    """Names of the arrow files of a folder that `save_to_disk` wrote."""
    check_file(folder / "state.json", str(folder / "state.json"), said.split(" = ")[0])
    try:
        state = json.loads((folder / "state.json").read_bytes()[: 2**20])
        return tuple(str(file["filename"]) for file in state["_data_files"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{said}: state.json does not list its files as datasets' save_to_disk does "
            f"({type(error).__name__}); save the data set again"
        ) from error


def _hub(data: DataConfig, place: str, split: str, field: str) -> Found:
    repo, _, own = place.partition(":")
    if own and split not in ("train", own):
        raise ValueError(f"data.split = {split}, but {field} = {place} names {own}: keep one")
    split = own or split
    said = f"{field} = {place}"
    name, part = _part(split, said)
    repository = open_repository(repo, data.revision, said)
    readme = None
    if "README.md" in repository.names:
        text = repository.fetch("README.md").read_text(encoding="utf-8", errors="replace")
        readme = None if text.encode()[: len(LFS)] == LFS else text
    if not data_files(repository.names):
        refuse_outside(readme, said)
        return _by_datasets(repo, repository.names, data, split, said, repository.commit)
    chosen = choose(repository.names, readme, data.config, name, said)
    paths = tuple(repository.fetch(file) for file in chosen.files)
    names = tuple(f"{repo}/{shown(file)}" for file in chosen.files)
    notes = _notes(chosen.files, chosen.others)
    return Found(paths, names, split, f"{repo} ({split})", part, notes)


def _by_datasets(
    place: str,
    names: Sequence[str],
    data: DataConfig,
    split: str,
    said: str,
    revision: str | None = None,
) -> Found:
    """What `datasets` makes of files that have no reader here."""
    name, part = _part(split, said)
    others = sorted(one for one in seen(names) if one != "README.md")
    if not others:
        choose(names, None, data.config, name, said)  # raises: no data file
    paths = arrow_files(place, data.config, name, revision, said)
    note = f"read by datasets.load_dataset: {listed(others, 5)}"
    shown_names = tuple(f"{place.rstrip('/')}/{path.name}" for path in paths)
    return Found(paths, shown_names, split, f"{place} ({split})", part, (note,))


def _part(split: str, said: str) -> tuple[str, Part]:
    """Name and slice of a split such as train[:10%]."""
    match = SPLIT.fullmatch(split)
    if match is None:
        raise ValueError(
            f"data.split = {split}: {said} has splits such as train, train[:100] or train[10%:]"
        )
    return match.group(1), (match.group(2), match.group(3))


def _sliced(source: Source, part: Part, notes: tuple[str, ...]) -> Source:
    def place(text: str | None) -> int | None:
        if text is None:
            return None
        return round(int(text[:-1]) / 100 * len(source.rows)) if text[-1] == "%" else int(text)

    start, stop, _ = slice(*map(place, part)).indices(len(source.rows))
    rows = (
        source.rows
        if (start, stop) == (0, len(source.rows))
        else list(itertools.islice(source.rows, start, stop))
    )
    return replace(source, rows=rows, notes=notes, first=start)
