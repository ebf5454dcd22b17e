"""Count of training rows, without a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from glassloop.config import DataConfig
from glassloop.data.opening import names_files, open_source


@dataclass(frozen=True)
class RowCount:
    """A number of rows and where it comes from.

    Attributes:
        rows: None if only loading the data could tell.
        how: The source of the number, or what to do for one.
    """

    rows: int | None
    how: str


def count_rows(data: DataConfig, given: int | None = None) -> RowCount:
    """Count training rows before any is dropped for its length.

    `given`, data.rows, or the rows of local files less the held-out ones. Raises ValueError for a
    local source that cannot be read.
    """
    if given is not None:
        return RowCount(given, "--rows")
    if data.rows is not None:
        return RowCount(
            data.rows,
            f"data.rows; fewer if some have more than {data.max_tokens:,} tokens (--with-data "
            "counts them)",
        )
    parts = [(one.source, one.split, one.rows, one.weight) for one in data.mix]
    total, names = 0, []
    for place, split, rows, weight in parts or [(data.source, data.split, None, 1.0)]:
        if not names_files(place) and not Path(place).expanduser().exists():
            return RowCount(
                None,
                f"data.source = {place} is not a local file or folder, and data.rows is not set: "
                "say --rows N, or --with-data",
            )
        found = len(open_source(data, place, split, "data.source").rows)
        held = round(data.heldout * found) if isinstance(data.heldout, float) else 0
        left = found - held if rows is None else min(rows, found - held)
        total += round(left * weight)
        less = f", less {held:,} held out" if held else ""
        times = f", {weight:g} times each" if weight != 1 else ""
        names.append(f"counted in {Path(place).name}{less}{times}")
    return RowCount(
        total, f"{'; '.join(names)}; fewer if some cannot be used (--with-data counts them)"
    )
