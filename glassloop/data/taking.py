"""Rows taken from one source in order."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from glassloop.config import DataConfig
from glassloop.data.duplicates import key
from glassloop.data.formats import Reading
from glassloop.data.names import listed
from glassloop.data.opening import Source
from glassloop.data.rows import Example, RowFault, Skip
from glassloop.data.turns import talk_of

ACROSS = "exact duplicate of a held-out row"


@dataclass(frozen=True)
class Taken:
    """Examples taken from one source, and what became of the other rows.

    Attributes:
        total: Rows that could have been taken.
        skipped: Reason -> rows passed over; rows behind the last one taken were not looked at.
        notes: What was read otherwise than written -> how often.
        unread: Keys of messages that were not read.
    """

    examples: tuple[Example, ...]
    total: int
    skipped: dict[str, int]
    notes: dict[str, int] = field(default_factory=dict)
    unread: tuple[str, ...] = ()


def take(
    source: Source,
    indices: Sequence[int],
    reading: Reading,
    data: DataConfig,
    limit: int | None,
    field: str,
    prefix: str = "",
    apart: dict[bytes, str] | None = None,
) -> Taken:
    """Take the first `limit` usable rows in order; all if None.

    Args:
        field: The config field that set `limit`, for messages.
        prefix: First part of row ids, in a mix.
        apart: Keys of rows that may not be taken, with their ids.

    Raises:
        ValueError: For rows with faults, unless data.on_bad_row=skip, and for too few rows.
    """
    examples: list[Example] = []
    skipped: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    unread: set[str] = set()
    met: list[str] = []  # "row = held-out row" for exact duplicates
    faults = Faults(data)
    looked = 0
    for index in indices:
        if len(examples) + (0 if faults.skips else len(faults.found)) == limit:
            break
        looked += 1
        row, row_id = source.rows[index], f"{prefix}{source.split}:{index + source.first}"
        cells = {role: row.get(name) for role, name in reading.columns.items()}
        try:
            talk = talk_of(cells, reading.kind, data, source.where(index))
        except Skip as reason:
            skipped[str(reason)] += 1
            continue
        except RowFault as fault:
            faults.add(fault)
            continue
        example = Example(row_id, talk.turns, talk.label, talk.tools)
        if apart and (twin := apart.get(key(example))) is not None:
            met.append(f"{row_id} = {twin}")
            skipped[ACROSS] += 1
            if data.heldout_duplicates == "drop":
                continue
        notes.update(talk.notes)
        unread |= talk.unread
        examples.append(example)
    faults.refuse(looked)
    skipped.update(faults.kinds())
    if met and data.heldout_duplicates == "refuse":
        raise ValueError(
            f"data.heldout = {data.heldout}: {len(met)} of {len(examples)} training rows ask "
            f"exactly what a held-out row asks ({listed(met, 3)}), so held-out loss would measure "
            "memory; set data.heldout_duplicates=drop to leave them out of training, or choose "
            "other held-out rows"
        )
    reasons = "".join(f", {rows:,} skipped ({reason})" for reason, rows in skipped.items())
    if not examples:
        raise ValueError(
            f"{source.name}: none of {len(indices):,} rows can be used{reasons}; correct the "
            "source or choose another"
        )
    if limit is not None and len(examples) < limit:
        raise ValueError(
            f"{field} = {limit:,}, but {source.name} has only {len(examples):,} usable rows of "
            f"{len(indices):,}{reasons}; set {field}={len(examples)} or leave it out to take all"
        )
    return Taken(tuple(examples), len(indices), dict(skipped), dict(notes), tuple(sorted(unread)))


class Faults:
    """Faults of rows: refused together in one sentence, or counted."""

    def __init__(self, data: DataConfig) -> None:
        self.skips = data.on_bad_row == "skip"
        self.found: list[str] = []  # kinds, in order
        self.first: RowFault | None = None

    def add(self, fault: RowFault) -> None:
        self.found.append(fault.kind)
        self.first = self.first or fault

    def kinds(self) -> Counter[str]:
        return Counter(self.found)

    def refuse(self, rows: int) -> None:
        """Raise ValueError with the first fault and their number, unless skipped."""
        if self.first is None or self.skips:
            return
        kinds = self.kinds()
        each = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
        raise ValueError(
            f"{self.first}. {len(self.found):,} of {rows:,} rows cannot train ({each}): correct "
            "them, or leave them out with data.on_bad_row=skip"
        ) from self.first


def order(indices: Sequence[int], seed: int, purpose: str) -> list[int]:
    """Order `indices` by a hash that is equal on every machine."""
    return sorted(
        indices, key=lambda index: hashlib.sha256(f"{purpose} {seed} {index}".encode()).digest()
    )
