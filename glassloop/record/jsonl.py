"""A run's files of JSON lines: their names, how they are read, how a torn end is mended."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from glassloop.record.records import SCHEMA

METRICS = "metrics.jsonl"  # one UpdateRecord a line
ROWS = "rows.jsonl"  # one RowRecord a line, "text" beside it under record.text=full; not there under none
PROBES = "probes.jsonl"  # one ProbeRecord a line
EVENTS = "events.jsonl"
EVALUATIONS = "evaluations.jsonl"
SAMPLES = "samples.jsonl"  # one SampleRecord a line; not there under record.text=none


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's file as dicts, in the order they were written.

    A torn last line (a kill, a full disk) is left out. Lines of older schema versions open: a missing `attempt` is 1, a missing
    `schema` 0. Infinite and NaN numbers stand as the strings "inf", "-inf", "nan", which float() reads.

    Raises:
        ValueError: another line than the last is damaged, or a line's schema is newer than this glassloop's.
    """
    *lines, tail = (
        Path(path).read_bytes().split(b"\n")
    )  # bytes: text may hold U+2028, where str.splitlines would cut
    records = []
    for number, line in enumerate(lines, 1):
        if (record := _parse(line)) is None:
            if line.strip():
                raise ValueError(
                    f"{path}, line {number}: not a JSON object; the file was damaged or edited. Remove the line"
                )
            continue
        records.append(record)
    if (record := _parse(tail)) is not None:  # only its line break is missing
        records.append(record)
    for record in records:
        record.setdefault("attempt", 1)
        if record.setdefault("schema", 0) > SCHEMA:
            raise ValueError(
                f"{path}: written under schema {record['schema']}, this glassloop knows schemas up to {SCHEMA}: update glassloop"
            )
    return records


def mend(path: Path) -> None:
    """Makes a file of JSON lines end in a line break: a torn last line is cut off, a whole one is ended. No file: nothing."""
    if not path.exists():
        return
    data = path.read_bytes()
    tail = data.rpartition(b"\n")[2]
    if not tail:
        return
    with path.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        if _parse(tail) is not None:
            file.write(b"\n")
        else:
            file.truncate(len(data) - len(tail))


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # JSON that is cut, and bytes that are not UTF-8
        return None
    return record if isinstance(record, dict) else None
