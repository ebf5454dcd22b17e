"""Rows that measure a trained adapter: the run's held-out rows, or others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glassloop.data.dataset import Dataset, build_rows
from glassloop.data.duplicates import key
from glassloop.data.rows import Example, Row
from glassloop.data.sources import Loaded, load_examples
from glassloop.data.templates import Template
from glassloop.use.trained import Trained, with_data

if TYPE_CHECKING:
    from glassloop.config import DataConfig


@dataclass(frozen=True)
class Rows:
    """Rows with their examples, aligned; `name` is for people."""

    rows: Sequence[Row]
    examples: Sequence[Example]
    name: str
    notes: tuple[str, ...]


def rows_of(
    trained: Trained,
    template: Template,
    *,
    source: str | None = None,
    split: str | None = None,
    rows: int | None = None,
    columns: Mapping[str, str] | None = None,
    cure: str = "give rows with --data FILE",
) -> Rows:
    """Read the run's held-out rows, or those of `source`.

    At most `rows` of them.

    `source` is read in the run's format and columns.

    Args:
        columns: of `source`, role -> name, instead of the run's data.columns; an empty name is the
            format's own.

    Raises:
        ValueError: there are none, or the source cannot be read; names the field or option and the
            cure.
    """
    data = trained.config.data
    if columns and source is None:
        raise ValueError("--columns names the columns of --data: give --data too")
    if source is None and split is None:
        if data.heldout is None:
            raise ValueError(
                f"{trained.checkpoint}: the run held no rows out (data.heldout): {cure}"
            )
        loaded = _loaded(data, trained.config.seed, f"or {cure}")
        part, name, notes = (
            build_rows(loaded, template, data).heldout,
            f"held-out rows of {loaded.heldout_source}",
            [],
        )
    else:
        changed: dict[str, Any] = {
            "source": source or data.source,
            "split": split or ("train" if source else data.split),
            "revision": None if source else data.revision,
            "columns": data.columns.model_copy(
                update={role: name or None for role, name in (columns or {}).items()}
            ),
        }
        other = with_data(
            trained, **changed, heldout=None, heldout_rows=None, rows=None
        ).config.data
        fits = (
            f"--data is read in the run's format ({data.format}) and columns: here --columns "
            "ROLE=NAME renames one; or name another file"
        )
        loaded = _loaded(other, trained.config.seed, fits if source else "name another --split")
        dataset: Dataset = build_rows(loaded, template, other)
        part, name, notes = dataset.train, f"rows of {loaded.source}", []
        notes += _seen_in_training(trained, loaded)
        if part.dropped:
            notes.append(
                f"{len(part.dropped)} rows are longer than data.max_tokens = {other.max_tokens} "
                "and were left out"
            )
    taken = slice(rows)
    if not part.rows:
        raise ValueError(f"{name}: no row is left to measure on: {cure}")
    return Rows(part.rows[taken], part.examples[taken], name, tuple(notes))


def _loaded(data: DataConfig, seed: int, cure: str) -> Loaded:
    try:
        return load_examples(data, seed)
    except ValueError as error:
        raise ValueError(f"{error}; {cure}") from error


def _seen_in_training(trained: Trained, loaded: Loaded) -> list[str]:
    """Note how many rows ask what a training row asked."""
    try:
        learned = {
            key(example)
            for example in load_examples(trained.config.data, trained.config.seed).train
        }
    except ValueError as error:
        return [f"not checked against the training rows, which cannot be read: {error}"]
    seen = sum(key(example) in learned for example in loaded.train)
    return (
        [
            f"{seen} of {len(loaded.train)} rows ask exactly what a training row asked: scores on "
            "them measure memory"
        ]
        if seen
        else []
    )
