"""Rows in mapped arrays, made objects one by one.

Legend: R rows, T tokens of all rows.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np

from glassloop.data.rows import Example, Row, Turn


@dataclass(frozen=True)
class StoredRows(Sequence[Row]):
    """Rows over arrays of a mapped file."""

    tokens: np.ndarray  # (T,) int32
    supervised: np.ndarray  # (T,) bool
    ends: np.ndarray  # (R,) int64: where each row's tokens end
    ids: np.ndarray  # uint8: row ids end to end, UTF-8
    id_ends: np.ndarray  # (R,) int64
    cut: np.ndarray  # (R,) bool

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Row, ...]: ...
    def __getitem__(self, place: int | slice) -> Row | tuple[Row, ...]:
        if isinstance(place, slice):
            return tuple(self[one] for one in range(*place.indices(len(self))))
        place = range(len(self))[place]  # raises IndexError
        start, end = int(self.ends[place - 1]) if place else 0, int(self.ends[place])
        return Row(
            self.row_id(place),
            tuple(self.tokens[start:end].tolist()),
            tuple(self.supervised[start:end].tolist()),
            bool(self.cut[place]),
        )

    def __iter__(self) -> Iterator[Row]:
        return (self[place] for place in range(len(self)))

    def row_id(self, place: int) -> str:
        start = int(self.id_ends[place - 1]) if place else 0
        return self.ids[start : int(self.id_ends[place])].tobytes().decode()

    @cached_property
    def lengths(self) -> array[int]:
        """(R,) tokens of each row."""
        return _counts(np.diff(self.ends, prepend=0))

    @cached_property
    def supervised_tokens(self) -> array[int]:
        """(R,) supervised tokens of each row."""
        sums = np.zeros(len(self), np.int32)
        starts = np.concatenate(([0], self.ends))[:-1]
        filled = starts < self.ends  # reduceat has no sum of nothing
        if filled.any():
            places = starts[filled]
            sums[filled] = np.add.reduceat(self.supervised, places, dtype=np.int32)
        return _counts(sums)


def _counts(numbers: np.ndarray) -> array[int]:
    return array("i", numbers.astype(np.int32).tobytes())


def lengths_of(rows: Sequence[Row]) -> array[int]:
    """(R,) tokens of each row."""
    return rows.lengths if isinstance(rows, StoredRows) else array("i", map(len, rows))


def supervised_of(rows: Sequence[Row]) -> array[int]:
    """(R,) supervised tokens of each row."""
    if isinstance(rows, StoredRows):
        return rows.supervised_tokens
    return array("i", (row.supervised_tokens for row in rows))


def places_of(rows: Sequence[Row]) -> dict[str, int]:
    """Row id -> its place."""
    if isinstance(rows, StoredRows):
        return {rows.row_id(place): place for place in range(len(rows))}
    return {row.row_id: place for place, row in enumerate(rows)}


def rows_with(rows: Sequence[Row], least: int) -> Sequence[Row]:
    """Rows that hold a token id of at least `least`."""
    if not isinstance(rows, StoredRows):
        return [row for row in rows if max(row.input_ids) >= least]
    found = np.searchsorted(rows.ends, np.flatnonzero(rows.tokens >= least), "right")
    return [rows[place] for place in np.unique(found).tolist()]


@dataclass(frozen=True)
class StoredExamples(Sequence[Example]):
    """Examples of which a mapped file holds the first ones.

    `len` counts all of them; asking for one that the file lacks is an error of the caller.
    """

    texts: np.ndarray  # uint8: JSON of each example, end to end
    ends: np.ndarray  # (examples in the file,) int64
    total: int

    def __len__(self) -> int:
        return self.total

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Example, ...]: ...
    def __getitem__(self, place: int | slice) -> Example | tuple[Example, ...]:
        if isinstance(place, slice):
            return tuple(self[one] for one in range(*place.indices(len(self))))
        place = range(len(self))[place]  # raises IndexError
        assert place < len(self.ends), f"the file holds {len(self.ends)} examples, not {place}"
        start = int(self.ends[place - 1]) if place else 0
        return example_of(json.loads(self.texts[start : int(self.ends[place])].tobytes()))


def example_of(raw: Any) -> Example:
    """An example from `dataclasses.asdict` of it."""
    turns = tuple(Turn(**turn) for turn in raw["turns"])
    return Example(raw["row_id"], turns, raw["label"], raw["tools"])
