"""Read a growing run: what is new since the last look."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from glassloop.disk.opening import open_plain, require_plain_folder
from glassloop.record.checked import check
from glassloop.record.jsonl import (
    EVALUATIONS,
    EVENTS,
    KINDS,
    MACHINE,
    METRICS,
    MOST_LINE_BYTES,
    parsed,
    too_long,
)
from glassloop.record.reading import Record, end_of
from glassloop.record.run_files import read_object

CHUNK_BYTES = 16 * 2**20


class Tail:
    """The records of a growing file, each once.

    A torn last line waits for its rest; a file that got shorter is read anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = 0  # bytes
        self._lines = 0
        self._rest = b""

    def new(self) -> tuple[list[Record], bool]:
        """(records since the last call, whether the file was begun anew).

        Raises ValueError as `read_records` does.
        """
        try:
            file = os.fdopen(open_plain(self.path), "rb")
        except FileNotFoundError:
            return [], False
        with file:
            size = os.fstat(file.fileno()).st_size
            anew = size < self._read
            if anew:
                self._read, self._lines, self._rest = 0, 0, b""
            records: list[Record] = []
            file.seek(self._read)
            while self._read < size and (data := file.read(CHUNK_BYTES)):
                self._read += len(data)
                *lines, self._rest = (self._rest + data).split(b"\n")
                if len(self._rest) > MOST_LINE_BYTES:
                    raise too_long(f"{self.path}, line {self._lines + len(lines) + 1}")
                for line in lines:
                    self._lines += 1
                    if line.strip():
                        where = f"{self.path}, line {self._lines}"
                        records.append(check(parsed(line, where), KINDS[self.path.name], where))
        return records, anew


class Watched:
    """What is known of a run by now."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"RUN = {folder} is no folder: name a run's folder (runs/NAME)")
        self.folder = folder
        self.updates: list[Record] = []
        self.events: list[Record] = []
        self.evaluations: list[Record] = []
        self.machine: list[Record] = []
        self._kept = {
            METRICS: self.updates,
            MACHINE: self.machine,
            EVENTS: self.events,
            EVALUATIONS: self.evaluations,
        }
        self._tails = {name: Tail(folder / name) for name in self._kept}

    def refresh(self) -> None:
        """Reads what has been added since the last call."""
        for name, kept in self._kept.items():
            records, anew = self._tails[name].new()
            if anew:
                kept.clear()
            for record in records:
                if name != EVENTS:  # a resumed run does updates again
                    while kept and kept[-1]["update"] >= record["update"]:
                        kept.pop()
                kept.append(record)

    @property
    def end(self) -> Record | None:
        return end_of(self.events)

    @property
    def planned(self) -> int:
        return int(self.updates[-1]["updates"]) if self.updates else 0

    def silent_s(self) -> float | None:
        """Seconds since metrics.jsonl last grew; None before the first update."""
        try:
            return (
                max(0.0, time.time() - (self.folder / METRICS).stat().st_mtime)
                if self.updates
                else None
            )
        except FileNotFoundError:
            return None

    def ranks(self) -> list[dict[str, Any]]:
        """Return what each rank does; [] for one rank."""
        folder = self.folder / "ranks"
        require_plain_folder(folder)
        paths = sorted(folder.glob("rank*.json"), key=lambda one: (len(one.name), one.name))
        return [position for path in paths if (position := read_object(path)) is not None]
