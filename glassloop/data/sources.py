"""Where rows come from: a data set on the hub, a local file or folder, or glassloop's own sample, read through `datasets`.

Which rows are taken depends on the seed, the source's length and nothing else: a row's place in the order is a hash of seed,
purpose and index, so no version of a random generator can move it. Held-out rows are set apart first, then training rows are
taken.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glassloop.config.config import DataConfig
from glassloop.data.duplicates import key, near_duplicates, repeated
from glassloop.data.formats import Skip, column_names, detect_format, to_turns
from glassloop.data.formats import verdict_of as verdict_of  # what evaluation reads answers with
from glassloop.data.rows import Example
from glassloop.data.text_files import check_json, check_lines, checked_header, checked_text

if TYPE_CHECKING:
    import datasets

BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
SAMPLE = Path(__file__).resolve().parents[2] / "data" / "calls.jsonl"


@dataclass(frozen=True)
class Taken:
    """Examples taken from one source, and what became of the other rows."""

    examples: tuple[Example, ...]
    total: int  # rows that could have been taken
    skipped: dict[
        str, int
    ]  # reason -> rows passed over on the way; rows behind the last one taken were not looked at


@dataclass(frozen=True)
class Loaded:
    """Examples of a run, with what is known of them before tokenising."""

    train: tuple[Example, ...]
    heldout: tuple[Example, ...]
    source: str  # where training rows come from, in words
    heldout_source: str | None
    format: str  # never "auto"
    total: int  # rows in the source of training rows, held-out ones excluded
    heldout_total: int
    skipped: dict[str, int]  # reason -> rows of the training source passed over
    heldout_skipped: dict[str, int]
    repeated: int  # training rows that are exact duplicates of another training row
    exact_across: int  # training rows left out because held-out rows hold their exact duplicate
    near_across: tuple[tuple[str, str], ...]  # (training row id, held-out row id)
    labels: dict[str, int]  # class -> training rows; empty where rows have no class
    heldout_labels: dict[str, int]
    heldout_repeated: int = 0  # held-out rows that are exact duplicates of another held-out row


@dataclass(frozen=True)
class Source:
    rows: datasets.Dataset
    split: str  # first part of row ids
    name: str  # for messages


def load_examples(data: DataConfig, seed: int) -> Loaded:
    """Reads, checks, shuffles and takes the rows that `data` asks for. Raises ValueError naming what is wrong and the cure."""
    source = open_source(data, data.source, data.split, "data.source")
    kind = detect_format(source.rows.column_names, data, source.name)
    indices = list(range(len(source.rows)))
    heldout_source, heldout = None, Taken((), 0, {})
    if data.heldout is not None:
        fraction = _fraction(data.heldout)
        if fraction is None:
            heldout_source = _heldout_source(data)
            heldout_indices = list(range(len(heldout_source.rows)))
        else:
            heldout_source, drawn = source, order(indices, seed, "heldout")
            count = round(fraction * len(indices))
            if not 0 < count < len(indices):
                raise ValueError(
                    f"data.heldout = {fraction} of {len(indices)} rows is {count}: no rows are left on one side; choose another"
                )
            heldout_indices, indices = drawn[:count], sorted(drawn[count:])
        heldout_order = (
            order(heldout_indices, seed, "heldout_rows")
            if data.shuffle or fraction is not None
            else heldout_indices
        )
        heldout = take(
            heldout_source, heldout_order, kind, data, data.heldout_rows, "data.heldout_rows"
        )
    apart = {key(example): example.row_id for example in heldout.examples}
    train_order = order(indices, seed, "rows") if data.shuffle else indices
    train = take(source, train_order, kind, data, data.rows, "data.rows", apart)
    return Loaded(
        train=train.examples,
        heldout=heldout.examples,
        source=source.name,
        heldout_source=None if heldout_source is None else heldout_source.name,
        format=kind,
        total=train.total,
        heldout_total=heldout.total,
        skipped={reason: rows for reason, rows in train.skipped.items() if reason != ACROSS},
        heldout_skipped=heldout.skipped,
        repeated=repeated(train.examples),
        exact_across=train.skipped.get(ACROSS, 0),
        near_across=tuple(near_duplicates(train.examples, heldout.examples)),
        labels=_balance(train.examples),
        heldout_labels=_balance(heldout.examples),
        heldout_repeated=repeated(heldout.examples),
    )


ACROSS = "exact duplicate of a held-out row"


def take(
    source: Source,
    indices: Sequence[int],
    kind: str,
    data: DataConfig,
    limit: int | None,
    field: str,
    apart: dict[bytes, str] | None = None,
) -> Taken:
    """The first `limit` usable rows in the order of `indices` (all if None). `apart`: keys of rows that may not be taken, with
    their ids."""
    names = column_names(kind, source.rows.column_names, data, source.name)
    examples: list[Example] = []
    skipped: Counter[str] = Counter()
    met: list[str] = []  # "row = held-out row" for exact duplicates
    for index in indices:
        if len(examples) == limit:
            break
        row = _row(source, index)
        row_id = f"{source.split}:{index}"
        try:
            turns, label = to_turns(
                {role: row[name] for role, name in names.items()},
                kind,
                data,
                f"{source.name}, row {index}",
            )
        except Skip as reason:
            skipped[str(reason)] += 1
            continue
        example = Example(row_id, turns, label)
        if apart and (twin := apart.get(key(example))) is not None:
            met.append(f"{row_id} = {twin}")
            skipped[ACROSS] += 1
            if data.heldout_duplicates == "drop":
                continue
        examples.append(example)
    if met and data.heldout_duplicates == "refuse":
        raise ValueError(
            f"data.heldout = {data.heldout}: {len(met)} of {len(examples)} training rows ask exactly what a held-out row asks "
            f"({', '.join(met[:3])}{', ...' if len(met) > 3 else ''}), so held-out loss would measure memory; "
            "set data.heldout_duplicates=drop to leave them out of training, or choose other held-out rows"
        )
    reasons = "".join(f", {rows:,} skipped ({reason})" for reason, rows in skipped.items())
    if not examples:
        raise ValueError(
            f"{source.name}: none of {len(indices):,} rows can be used{reasons}; correct the source or choose another"
        )
    if limit is not None and len(examples) < limit:
        raise ValueError(
            f"{field} = {limit:,}, but {source.name} has only {len(examples):,} usable rows of {len(indices):,}{reasons}; "
            f"set {field}={len(examples)} or leave it out to take all"
        )
    return Taken(tuple(examples), len(indices), dict(skipped))


def _row(source: Source, index: int) -> dict[str, Any]:
    try:
        return source.rows[index]
    except Exception as error:  # what `datasets` raises for a table with odd names inside
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(
            f"{source.name}, row {index} cannot be read ({reason}): correct the row or leave it out"
        ) from error


def order(indices: Sequence[int], seed: int, purpose: str) -> list[int]:
    """`indices` in an order that depends on them, `seed` and `purpose` alone; the same with every version and machine."""
    return sorted(
        indices, key=lambda index: hashlib.sha256(f"{purpose} {seed} {index}".encode()).digest()
    )


def open_source(data: DataConfig, place: str, split: str, field: str) -> Source:
    """Opens `place`, a hub id, file, folder or `sample`; `field` is the config field that named it. Raises ValueError."""
    path = SAMPLE if place == "sample" else Path(place).expanduser()
    if place == "sample" and not path.is_file():
        raise ValueError(
            f"{field} = sample: {path} is missing; the sample lies in a checkout: use one (pip install -e .)"
        )
    if path.is_dir():
        source = _load(place, f"{place} ({split})", split, field, path=str(path), name=data.config)
    elif path.suffix.lower() in BUILDERS:
        if not path.is_file():
            raise ValueError(f"{field} = {place}: there is no such file (looked in {Path.cwd()})")
        if field == "data.source" and split != "train":
            raise ValueError(
                f"data.split = {split}: data.source = {place} is one file and has no splits; leave data.split out"
            )
        source = _load_file(path, place, split, field)
    elif path.exists():
        raise ValueError(
            f"{field} = {place}: a file must end in {', '.join(BUILDERS)}, not {path.suffix or 'nothing'}"
        )
    else:
        source = _load(
            place,
            f"{place} ({split})",
            split,
            field,
            path=place,
            name=data.config,
            revision=data.revision,
        )
    if not len(source.rows):
        raise ValueError(f"{field} = {place}: {source.name} has no rows")
    return source


def _heldout_source(data: DataConfig) -> Source:
    place = str(data.heldout)
    if place == "sample" or Path(place).suffix.lower() in BUILDERS:
        return open_source(data, place, "heldout", "data.heldout")
    if place == data.split:
        raise ValueError(
            f"data.heldout = {place} is also data.split: held-out rows may not be trained on; choose another split or a fraction"
        )
    if data.source == "sample" or Path(data.source).suffix.lower() in BUILDERS:
        raise ValueError(
            f"data.heldout = {place}: data.source = {data.source} is one file without splits; give a file or a fraction (0.1)"
        )
    return open_source(data, data.source, place, "data.heldout")


def _fraction(heldout: str | float) -> float | None:
    """`data.heldout` as a fraction, or None where it names a split or a file."""
    try:
        fraction = float(heldout)
    except ValueError:
        return None
    if not 0 < fraction < 1:
        raise ValueError(
            f"data.heldout = {heldout}: a fraction must lie between 0 and 1 (for example 0.1)"
        )
    return fraction


def _load_file(path: Path, place: str, split: str, field: str) -> Source:
    import datasets

    builder = BUILDERS[path.suffix.lower()]
    options: dict[str, object] = {}
    if builder != "parquet":
        text = checked_text(path, place, field)
        if (
            builder == "csv"
        ):  # every cell is read as the text that it is: no numbers, no dates, no "NA" that turns into nothing
            header = checked_header(text, place, field)
            options = {
                "features": datasets.Features({name: datasets.Value("string") for name in header}),
                "keep_default_na": False,
            }
        else:
            (check_lines if path.suffix.lower() == ".jsonl" else check_json)(text, place, field)
    # The path is quoted: `datasets` would read [, ] and * in it as a pattern.
    files = {split: "".join(f"[{char}]" if char in "[*?" else char for char in str(path.resolve()))}
    return _load(place, place, split, field, path=builder, data_files=files, **options)


def _load(place: str, called: str, split: str, field: str, **arguments: object) -> Source:
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(split=split, **arguments)  # type: ignore[call-overload]
    except Exception as error:  # `datasets` and what it calls raise dozens of kinds; all mean that this source cannot be read
        reason = error.__cause__ or error
        text = " ".join(str(reason).split()) or type(reason).__name__
        if "no data" in text or isinstance(reason, StopIteration):
            raise ValueError(f"{field} = {place}: it has no rows") from error
        hub = "a hub id needs network access, the right data.config, data.split and data.revision, and a login if it is not public"
        cure = (
            "the file is damaged or of another kind than its name says"
            if "data_files" in arguments
            else hub
        )
        raise ValueError(
            f"{field} = {place} cannot be read: {text[:300]} ({type(reason).__name__}); {cure}"
        ) from error
    return Source(rows, split, called)


def _balance(examples: Sequence[Example]) -> dict[str, int]:
    return dict(
        sorted(Counter(example.label for example in examples if example.label is not None).items())
    )
