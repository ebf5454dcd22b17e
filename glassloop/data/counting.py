"""Training rows of a run, counted without loading data, and tokens of its rows once they are."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glassloop.config.config import DataConfig
from glassloop.plan.work import TokenCounts

if TYPE_CHECKING:
    from glassloop.data.batches import Batches

SAMPLE = Path(__file__).resolve().parents[2] / "data" / "calls.jsonl"


@dataclass(frozen=True)
class RowCount:
    """A number of rows, and where it comes from."""

    rows: int | None  # None: only loading the data could tell
    how: str  # or what to do to get the number


def count_rows(data: DataConfig, given: int | None = None) -> RowCount:
    """Count training rows before any is dropped for its length.

    The number is `given`, data.rows, or that of a local file less the held-out rows. Raises
    ValueError if the source is a local file that does not exist.
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


def count_tokens(batches: Batches) -> TokenCounts:
    """Count over all updates, in both layouts; the heaviest pass is of the run's own layout."""
    from glassloop.data.batches import packed_passes  # torch: rows are counted without it

    lengths = [len(row) for row in batches.rows]
    supervised = [row.supervised_tokens for row in batches.rows]
    plan, real, labels = batches.plan, 0, 0
    slots, passes = {"literal": 0, "packed": 0}, {"literal": 0, "packed": 0}
    heaviest, share = (0, 0, 0, 0), 0  # places, rows, tokens, supervised
    for update in range(1, plan.updates + 1):
        window = batches.window(update)
        real += sum(lengths[row] for row in window.rows)
        labels += sum(supervised[row] for row in window.rows)
        chunks = [
            window.rows[start : start + plan.size]
            for start in range(0, len(window.rows), plan.size)
        ]
        bins = packed_passes(window.rows, lengths, plan.ranks, batches.pass_tokens)
        packed = [one for rank in bins for one in rank]
        share = max(share, *(sum(lengths[row] for one in rank for row in one) for rank in bins))
        slots["literal"] += sum(len(chunk) * max(lengths[row] for row in chunk) for chunk in chunks)
        slots["packed"] += sum(lengths[row] for one in packed for row in one)
        passes["literal"] += len(chunks)
        passes["packed"] += len(packed)
        for one in (one for rank in window.passes for one in rank):
            longest, total = max(lengths[row] for row in one), sum(lengths[row] for row in one)
            rows, tokens = (1, total) if window.packed else (len(one), longest)
            heaviest = max(
                heaviest, (rows * tokens, rows, tokens, sum(supervised[row] for row in one))
            )
    return TokenCounts(
        real,
        labels,
        slots["literal"],
        passes["literal"],
        slots["packed"],
        passes["packed"],
        *heaviest[1:],
        share,
    )
