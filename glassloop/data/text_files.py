"""Local csv, json and jsonl files, looked at before they are parsed, so that damage is named by file and line.

`place` is the file as the user wrote it and `field` the config field that names it: both are for messages.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from glassloop.data.formats import shorten


def checked_text(path: Path, place: str, field: str) -> str:
    """The file as text. Raises ValueError for an empty file, NUL bytes and broken UTF-8."""
    raw = path.read_bytes()
    if not raw.strip():
        raise ValueError(f"{field} = {place}: the file is empty")
    if b"\0" in raw:
        line = raw[: raw.index(b"\0")].count(b"\n") + 1
        raise ValueError(
            f"{field} = {place}: NUL byte in line {line}; the file is damaged or not UTF-8 text: write it as UTF-8"
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        found = raw[max(0, error.start - 20) : error.start + 20]
        raise ValueError(
            f"{field} = {place}: line {line} is not UTF-8 near {found!r}; convert the file (iconv -t UTF-8)"
        ) from error


def checked_header(text: str, place: str, field: str) -> list[str]:
    """Column names of a csv text. Raises ValueError where a row has more or fewer cells, or quotes do not match."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next((row for row in reader if row), [])
        if not header:
            raise ValueError(f"{field} = {place}: the file is empty")
        if len(set(header)) < len(header):
            raise ValueError(
                f"{field} = {place}: columns {', '.join(header)} are not all different; rename them"
            )
        for index, row in enumerate(row for row in reader if row):
            if len(row) != len(header):
                raise ValueError(
                    f"{field} = {place}, row {index}: {len(row)} cells {shorten(row)} for {len(header)} columns; "
                    "a cell with a comma, a quote or a line break needs quotes around it"
                )
    except csv.Error as error:
        raise ValueError(
            f"{field} = {place}, line {reader.line_num}: {error}; quotes inside a cell are doubled"
        ) from error
    return header


def check_json(text: str, place: str, field: str) -> None:
    """Raises ValueError where a row of json text is no object, in a list or one a line: pyarrow's reader (26.0) ends the process at a null.

    Text that is neither is left to the reader, which refuses it.
    """
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError):
        rows = [_parsed_or_object(line) for line in text.split("\n") if line.strip()]
    for index, row in enumerate(rows if isinstance(rows, list) else [rows]):
        if not isinstance(row, dict):
            raise ValueError(
                f"{field} = {place}, row {index}: {shorten(row)} is not a JSON object with named columns"
            )


def _parsed_or_object(line: str) -> object:
    """The JSON value of a line; {} for one that is no JSON by itself."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return {}


def check_lines(text: str, place: str, field: str) -> None:
    """Raises ValueError where a line of jsonl text is no JSON object."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            said = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            raise ValueError(
                f"{field} = {place}, line {number}: {said} in {shorten(line)}; each line must be one JSON object"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{field} = {place}, line {number}: {shorten(line)} is not a JSON object with named columns"
            )
