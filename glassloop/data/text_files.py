"""Readers of csv, tsv, json and jsonl files that keep the text.

A cell of csv is its characters: no number, date or NA is recognised. JSON gives the values that it
spells. Compressed files (.gz, .xz, .bz2, .zst) are read as they are unpacked.

`place` is the file as the user wrote it and `field` the config field that named it: both are for
messages. `limit` is the most bytes that the file may unpack to.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from glassloop.data.names import listed, shorten

LINE_BYTES = 64 * 2**20  # longest line; no row that trains is as long
SNIFFED_ROWS = 50
DELIMITERS = (",", ";", "\t")
PACKED = {".gz": "gzip", ".xz": "xz", ".bz2": "bzip2", ".zst": "zstd"}
LFS = b"version https://git-lfs.github.com/spec/"
Rows = tuple[tuple[str, ...], list[dict[str, Any]]]  # columns in order of appearance, rows


def read_csv(path: Path, place: str, field: str, limit: int) -> Rows:
    """Rows of a csv or tsv file, every cell as text.

    Columns without a name are left out.

    Raises ValueError for damage, with line or row, and if rows differ in their number of cells.
    """
    with _lines(path, place, field, limit) as lines:
        head = list(islice(_pieces(lines), 2000))
    marked = re.fullmatch(r'"?sep=(.)"?\s*', head[0]) if head else None  # Excel's first line
    delimiter = marked.group(1) if marked else _delimiter(head, path)
    csv.field_size_limit(LINE_BYTES)
    with _lines(path, place, field, limit) as lines:
        pieces = islice(_pieces(lines), 1 if marked else 0, None)
        reader = csv.reader(pieces, strict=True, delimiter=delimiter)
        try:
            header = next((row for row in reader if row), [])
            if not header:
                raise ValueError(f"{field} = {place}: the file is empty")
            named = [name for name in header if name.strip()]
            if len(set(named)) < len(named):
                raise ValueError(
                    f"{field} = {place}: columns {listed(named)} are not all different; rename them"
                )
            rows = []
            for index, row in enumerate(row for row in reader if row):
                if len(row) != len(header):
                    raise ValueError(
                        f"{field} = {place}, row {index}: {len(row)} cells {shorten(row)} for "
                        f"{len(header)} columns; a cell with a {_NAMES.get(delimiter, delimiter)}, "
                        "a quote or a line break needs quotes around it"
                    )
                rows.append(
                    {name: cell for name, cell in zip(header, row, strict=True) if name.strip()}
                )
        except csv.Error as error:
            cure = (
                f"no cell that trains is as long as {LINE_BYTES:,} characters"
                if "field limit" in str(error)
                else "quotes inside a cell are doubled"
            )
            raise ValueError(
                f"{field} = {place}, line {reader.line_num}: {error}; {cure}"
            ) from error
    unnamed = ("(unnamed)",) if len(named) < len(header) else ()
    return (*named, *unnamed), rows


_NAMES = {",": "comma", ";": "semicolon", "\t": "tab"}


def _delimiter(head: list[str], path: Path) -> str:
    """Tab for .tsv; else the delimiter that splits the first rows alike."""
    if ".tsv" in (suffix.lower() for suffix in path.suffixes):
        return "\t"
    widths: dict[str, int] = {}
    for delimiter in DELIMITERS:
        reader = csv.reader(head, delimiter=delimiter)
        try:
            found = [len(row) for row in islice((row for row in reader if row), SNIFFED_ROWS)]
        except csv.Error:
            continue
        if found and found[0] > 1:
            widths[delimiter] = found[0]
            if len(set(found)) == 1:
                return delimiter
    return max(widths, key=lambda delimiter: widths[delimiter], default=",")


def _pieces(lines: Iterator[tuple[int, str]]) -> Iterator[str]:
    """Lines, parted also behind a carriage return that stands alone."""
    for _, line in lines:
        yield from re.split(r"(?<=\r)(?!\n)(?=.)", line, flags=re.DOTALL)


def read_jsonl(path: Path, place: str, field: str, limit: int) -> Rows:
    """Rows of a file with one JSON object a line.

    Raises ValueError naming the line.
    """
    columns: dict[str, None] = {}
    rows: list[dict[str, Any]] = []
    with _lines(path, place, field, limit) as lines:
        for number, ended in lines:
            if not (line := ended.strip()):
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{field} = {place}, line {number}: {_said(error)} in {shorten(line)}; "
                    "each line must be one JSON object"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"{field} = {place}, line {number}: {shorten(line)} is not a JSON object with "
                    "named columns"
                )
            columns.update(dict.fromkeys(row))
            rows.append(row)
    return tuple(columns), rows


def read_json(path: Path, place: str, field: str, limit: int) -> Rows:
    """Rows of a JSON list, or of one object a line."""
    with _checked(path, place, field), _opened(path) as file:
        raw = file.read(limit + 1)
    _within(len(raw), limit, place, field)
    text = _decoded(raw, 1, place, field)
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            return read_jsonl(path, place, field, limit)
        at = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(
            f"{field} = {place}{at}: {_said(error)}; the file must be a list of JSON objects, or "
            "one object a line"
        ) from error
    rows = rows if isinstance(rows, list) else [rows]
    columns: dict[str, None] = {}
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(
                f"{field} = {place}, row {index}: {shorten(row)} is not a JSON object with named "
                "columns"
            )
        columns.update(dict.fromkeys(row))
    return tuple(columns), rows


def _said(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


@contextmanager
def _lines(path: Path, place: str, field: str, limit: int) -> Iterator[Iterator[tuple[int, str]]]:
    """(number from 1, line with its end), checked as they are read."""

    def lines(file: IO[bytes]) -> Iterator[tuple[int, str]]:
        size = path.stat().st_size if path.suffix.lower() not in PACKED else limit
        total, number = 0, 0
        while raw := file.readline(LINE_BYTES + 1):
            number, total = number + 1, total + len(raw)
            if len(raw) > LINE_BYTES:
                raise ValueError(
                    f"{field} = {place}, line {number}: it is longer than {LINE_BYTES:,} bytes, "
                    "and no row that trains is as long; split or remove it"
                )
            _within(total, limit, place, field)
            if total > size:  # it grows as it is read, perhaps without end
                raise _changed(place, field)
            yield number, _decoded(raw, number, place, field)

    with _checked(path, place, field), _opened(path) as file:
        yield lines(file)


def check_file(path: Path, place: str, field: str) -> None:
    """Raise ValueError for a path that is no plain file with content.

    A Git LFS pointer is none.
    """
    if not path.exists():
        raise ValueError(f"{field} = {place}: there is no such file (looked in {Path.cwd()})")
    if not path.is_file():
        raise ValueError(f"{field} = {place}: it is not a plain file; copy its rows into one")
    with path.open("rb") as file:
        head = file.read(4096)
    if not head.strip() and path.stat().st_size <= 4096:
        raise ValueError(f"{field} = {place}: the file is empty")
    if head.startswith(LFS):
        raise ValueError(
            f"{field} = {place}: it is a Git LFS pointer, not the file; fetch it with `git lfs "
            "pull`"
        )


@contextmanager
def unchanged(path: Path, place: str, field: str) -> Iterator[None]:
    """Raise ValueError if the file changed while the body read it."""

    def state() -> tuple[int, int, int]:
        found = path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns

    before = state()
    yield
    if state() != before:
        raise _changed(place, field)


def _changed(place: str, field: str) -> ValueError:
    return ValueError(
        f"{field} = {place}: the file changed while it was read; start again once it is whole"
    )


@contextmanager
def _checked(path: Path, place: str, field: str) -> Iterator[None]:
    check_file(path, place, field)
    try:
        with unchanged(path, place, field):
            yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        packed = PACKED.get(path.suffix.lower())
        cure = f"the file is damaged or no {packed} file" if packed else "check the disk"
        raise ValueError(f"{field} = {place} cannot be read: {error}; {cure}") from error


def _opened(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    how = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}.get(suffix)
    return cast(IO[bytes], open(path, "rb") if how is None else how(path, "rb"))


def _within(size: int, limit: int, place: str, field: str) -> None:
    if size > limit:
        raise ValueError(
            f"{field} = {place}: its rows are more than data.max_gib = {limit / 2**30:.3g} GiB of "
            "text; raise data.max_gib if the memory of this machine holds them"
        )


def _decoded(raw: bytes, number: int, place: str, field: str) -> str:
    """Bytes that begin in line `number` as text.

    Raises ValueError for NUL bytes and broken UTF-8.
    """
    if number == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(
            f"{field} = {place}: the file is UTF-16; convert it (iconv -f UTF-16 -t UTF-8)"
        )
    if b"\0" in raw:
        line = number + raw[: raw.index(b"\0")].count(b"\n")
        raise ValueError(
            f"{field} = {place}: NUL byte in line {line}; the file is damaged or not UTF-8 text: "
            "write it as UTF-8"
        )
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = number + raw[: error.start].count(b"\n")
        found = raw[max(0, error.start - 20) : error.start + 20]
        raise ValueError(
            f"{field} = {place}: line {line} is not UTF-8 near {found!r}; convert the file "
            "(iconv -f WINDOWS-1252 -t UTF-8, if it comes from Windows)"
        ) from error
