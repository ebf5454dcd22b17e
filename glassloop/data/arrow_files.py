"""Parquet and Arrow files as rows of Python values.

Types stay as the file has them: a number or date in a text column is refused later, by its row.
`place`, `field` and `limit` are as in text_files.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glassloop.data.names import shown
from glassloop.data.text_files import Rows, check_file, unchanged

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS = 1024
SHARING_ROWS = 16


class JsonText(str):
    """A text in a JSON column: its quotes may be the writer's."""


def read_arrow(path: Path, place: str, field: str, limit: int) -> Rows:
    """Rows of a parquet, arrow or feather file.

    Raises ValueError for damage and excess size.
    """
    import pyarrow

    check_file(path, place, field)
    batches = _parquet if path.suffix.lower() == ".parquet" else _ipc
    columns: tuple[str, ...] = ()
    rows: list[dict[str, Any]] = []
    total = 0
    try:
        with unchanged(path, place, field):
            for batch in _small(batches(path, limit, place, field)):
                columns = tuple(batch.schema.names)
                if len(set(columns)) < len(columns):
                    raise ValueError(f"{field} = {place}: two columns have one name; rename them")
                total += batch.nbytes
                new = _rows(batch) if total <= limit else []
                total += _unpacked(new) if _shares(batch) else 0
                if total > limit:
                    raise _too_large(limit, place, field)
                rows += new
    except (pyarrow.ArrowException, OSError, MemoryError) as error:
        said = shown(" ".join(str(error).split()), 200)
        raise ValueError(
            f"{field} = {place} cannot be read: {said} ({type(error).__name__}); the file is "
            "damaged or of another kind than its name says"
        ) from error
    return columns, rows


def _small(batches: Iterator[pyarrow.RecordBatch]) -> Iterator[pyarrow.RecordBatch]:
    """Batches of few rows, fewer if rows may share a text."""
    for batch in batches:
        rows = SHARING_ROWS if _shares(batch) else BATCH_ROWS
        yield from (batch.slice(start, rows) for start in range(0, max(1, batch.num_rows), rows))


def _shares(batch: pyarrow.RecordBatch) -> bool:
    """True if rows may point to one text, so that bytes mislead."""
    return any(re.search("dictionary|view|run_end", str(kind)) for kind in batch.schema.types)


def _unpacked(value: Any) -> int:
    """Characters of all texts within rows."""
    if isinstance(value, dict):
        return sum(map(_unpacked, value.values()))
    if isinstance(value, list):
        return sum(map(_unpacked, value))
    return len(value) if isinstance(value, str | bytes) else 8


def _parquet(path: Path, limit: int, place: str, field: str) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
        found = file.metadata
        groups = [found.row_group(index) for index in range(found.num_row_groups)]
        chunks = [group.column(at) for group in groups for at in range(group.num_columns)]
        if sum(chunk.total_uncompressed_size for chunk in chunks) > limit:
            raise _too_large(limit, place, field)
        # A dictionary writes a long text once, so every row of a batch may hold the whole chunk.
        largest = max((chunk.total_uncompressed_size for chunk in chunks), default=0)
        rows = max(1, min(BATCH_ROWS, limit // 4 // max(1, largest)))
        yield from file.iter_batches(batch_size=rows, use_threads=False)
        if not found.num_rows:
            yield pyarrow.RecordBatch.from_pylist([], schema=file.schema_arrow)


def _ipc(path: Path, limit: int, place: str, field: str) -> Iterator[pyarrow.RecordBatch]:
    """Batches of the file or stream format, each validated in full."""
    import pyarrow.ipc

    with pyarrow.memory_map(str(path)) as source:
        try:
            file = pyarrow.ipc.open_file(source)
            batches = (file.get_batch(index) for index in range(file.num_record_batches))
        except pyarrow.ArrowInvalid:
            source.seek(0)
            file = pyarrow.ipc.open_stream(source)
            batches = iter(file)
        for batch in batches:
            batch.validate(full=True)
            yield batch
        yield pyarrow.RecordBatch.from_pylist([], schema=file.schema)


def _rows(batch: pyarrow.RecordBatch) -> list[dict[str, Any]]:
    """The rows of a batch, with JSON columns decoded."""
    import pyarrow

    rows = batch.to_pylist()
    for name, kind in zip(batch.schema.names, batch.schema.types, strict=True):
        if isinstance(kind, pyarrow.JsonType):
            for row in rows:
                row[name] = None if row[name] is None else _value(row[name])
    return rows


def _value(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return JsonText(text)
    return JsonText(text) if isinstance(value, str) else value


def _too_large(limit: int, place: str, field: str) -> ValueError:
    return ValueError(
        f"{field} = {place}: its rows unpack to more than data.max_gib = {limit / 2**30:.3g} GiB; "
        "raise data.max_gib if the memory of this machine holds them"
    )
