"""How many training rows a run will have, counted without loading a data set or a tokenizer."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

from glassloop.config.config import DataConfig

SAMPLE = Path(__file__).resolve().parents[2] / "data" / "calls.jsonl"


@dataclass(frozen=True)
class RowCount:
    """rows: None where only loading the data could tell. how: where the number comes from, or what to do for one."""

    rows: int | None
    how: str


def count_rows(data: DataConfig, given: int | None = None) -> RowCount:
    """Training rows before any is dropped for its length: `given`, data.rows, or those of a local file less the held-out ones.

    Raises ValueError where the source is a local file that is not there.
    """
    if given is not None:
        return RowCount(given, "--rows")
    if data.rows is not None:
        return RowCount(
            data.rows,
            f"data.rows; fewer if some have more than {data.max_tokens:,} tokens (--with-data counts them)",
        )
    file = SAMPLE if data.source == "sample" else Path(data.source).expanduser()
    if file.suffix.lower() not in (".csv", ".json", ".jsonl"):
        return RowCount(
            None,
            f"data.source = {data.source} is not a csv, json or jsonl file, and data.rows is not set: say --rows N, or --with-data",
        )
    if not file.is_file():
        raise ValueError(
            f"data.source = {data.source}: there is no such file (looked in {Path.cwd()})"
        )
    try:
        total = _rows_of(file)
    except (ValueError, TypeError, csv.Error, OSError) as error:
        return RowCount(
            None,
            f"data.source = {data.source} could not be counted ({error}): --with-data says what is wrong",
        )
    how = f"counted in {file.name}"
    if isinstance(data.heldout, float):
        held = round(data.heldout * total)
        total, how = total - held, f"{how}, less {held:,} held out"
    return RowCount(total, f"{how}; fewer if some cannot be used (--with-data counts them)")


def _rows_of(file: Path) -> int:
    if file.suffix.lower() == ".csv":
        csv.field_size_limit(max(csv.field_size_limit(), file.stat().st_size))
        with open(file, newline="", encoding="utf-8-sig") as handle:
            return max(0, sum(1 for row in csv.reader(handle) if row) - 1)
    with open(file, encoding="utf-8-sig") as handle:
        if file.suffix.lower() == ".json" and (text := handle.read()).lstrip().startswith("["):
            return len(json.loads(text))
        handle.seek(0)
        return sum(1 for line in handle if line.strip())
