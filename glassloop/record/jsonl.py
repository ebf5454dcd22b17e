"""Read and mend a run's files of JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glassloop.disk.opening import open_plain
from glassloop.record.checked import Kind, check
from glassloop.record.records import (
    SCHEMA,
    EvaluationRecord,
    Event,
    MachineRecord,
    ProbeRecord,
    RowRecord,
    SampleRecord,
    UpdateRecord,
)

METRICS = "metrics.jsonl"  # one UpdateRecord a line
ROWS = "rows.jsonl"  # one RowRecord a line, under record.text=full with its "text"; not under none
PROBES = "probes.jsonl"
MACHINE = "machine.jsonl"  # one MachineRecord a line; not there under record.machine_every_s=null
EVENTS = "events.jsonl"
EVALUATIONS = "evaluations.jsonl"
SAMPLES = "samples.jsonl"  # not there under record.text=none
KINDS: dict[str, Kind] = {
    METRICS: UpdateRecord,
    ROWS: RowRecord,
    PROBES: ProbeRecord,
    MACHINE: MachineRecord,
    EVENTS: Event,
    EVALUATIONS: EvaluationRecord,
    SAMPLES: SampleRecord,
}
MOST_FILE_BYTES = 4 * 2**30
MOST_LINE_BYTES = 64 * 2**20


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the checked records of a run's file.

    [] without a file.

    Raises:
        ValueError: as `read_jsonl`; or a field is missing or wrong. Names file, line and field.
        NotPlain: a link, FIFO or device has the file's name.
    """
    kind = KINDS[path.name]
    try:
        return [check(record, kind, f"{path}, line {number}") for number, record in _lines(path)]
    except FileNotFoundError:
        return []


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a file as dicts, in order.

    A torn last line (a kill, a full disk) is left out. Lines of older schema versions open: a
    missing `attempt` is 1, a missing `schema` 0. Infinite and NaN numbers stand as the strings
    "inf", "-inf", "nan", which float() reads.

    Raises:
        ValueError: another line than the last is damaged, or a line's schema is newer than this
            glassloop's.
        NotPlain: a link, FIFO or device has the file's name.
    """
    return [record for _, record in _lines(path)]


def parsed(line: bytes, where: str) -> dict[str, Any]:
    """Parse a whole line.

    Raises ValueError, naming `where`, for what is no record.
    """
    if (record := _parse(line)) is None:
        raise ValueError(
            f"{where}: not a JSON object; the file was damaged or edited. Remove the line"
        )
    schema = record.setdefault("schema", 0)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise ValueError(
            f"{where}: written under schema {schema!r}, this glassloop knows schemas up to "
            f"{SCHEMA}: update glassloop"
        )
    record.setdefault("attempt", 1)
    return record


def mend(path: Path) -> None:
    """Make a file of JSON lines end in a line break.

    A torn last line is cut off, a whole one is ended.
    """
    try:
        opened = open_plain(path, os.O_RDWR)
    except FileNotFoundError:
        return
    with open(opened, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - MOST_LINE_BYTES))
        tail = file.read().rpartition(b"\n")[2]
        if len(tail) == MOST_LINE_BYTES:
            raise too_long(str(path))
        if tail and _parse(tail) is not None:
            file.write(b"\n")
        elif tail:
            file.truncate(size - len(tail))


def too_long(where: str) -> ValueError:
    """The error for a line of more than MOST_LINE_BYTES."""
    return ValueError(
        f"{where}: longer than {MOST_LINE_BYTES / 2**20:g} MiB; the file was damaged or edited. "
        "Remove the line"
    )


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, record) of every whole line."""
    with open(open_plain(path), "rb") as file:
        if os.fstat(file.fileno()).st_size > MOST_FILE_BYTES:
            raise ValueError(
                f"{path} has more than {MOST_FILE_BYTES / 2**30:g} GiB: "
                "put an undamaged copy in its place"
            )
        number = 0
        while line := file.readline(MOST_LINE_BYTES + 1):
            number += 1
            if len(line) > MOST_LINE_BYTES:
                raise too_long(f"{path}, line {number}")
            torn = not line.endswith(b"\n") and _parse(line) is None
            if line.strip() and not torn:
                yield number, parsed(line, f"{path}, line {number}")


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # cut, not UTF-8, or nested too deep
        return None
    return record if isinstance(record, dict) else None
