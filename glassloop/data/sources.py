"""The rows of a run: read, checked, shuffled, held out and taken.

Which rows are taken depends on the seed, the source's length and nothing else: a row's place in
the order is a hash of seed, purpose and index, so no version of a random generator can move it.
Held-out rows are set apart first, then training rows are taken.

`data.mix` reads several sources in this way. An epoch then has each row of a source `weight`
times; of a weight of 1.5, half of the rows twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from glassloop.config import DataConfig
from glassloop.data.duplicates import key
from glassloop.data.formats import Reading, reading_of
from glassloop.data.names import listed, shown
from glassloop.data.opening import Found, Source, find_source, names_files, read_source
from glassloop.data.rows import Example
from glassloop.data.taking import ACROSS, Taken, order, take


@dataclass(frozen=True)
class MixedPart:
    """One source of a mix; `rows` of an epoch, with copies."""

    name: str
    weight: float
    rows: int
    prefix: str  # with which the ids of its rows begin


@dataclass(frozen=True)
class Loaded:
    """Examples of a run, with what is known of them before tokenising.

    Attributes:
        source: Where training rows come from, for people.
        format: Never "auto".
        total: Rows in the source of training rows, held-out ones excluded.
        skipped: Reason -> rows of the training source passed over.
        exact_across: Training rows left out because they repeat a held-out row.
        notes: Sentences on how the source was read.
        mixed: The parts of data.mix.
    """

    train: Sequence[Example]
    heldout: Sequence[Example]
    source: str
    heldout_source: str | None
    format: str
    total: int
    heldout_total: int
    skipped: dict[str, int]
    heldout_skipped: dict[str, int]
    exact_across: int = 0
    notes: tuple[str, ...] = ()
    mixed: tuple[MixedPart, ...] = ()


Place = tuple[str, str, str]  # what names a source: value, split, config field
Files = Mapping[Place, Found]


def find_files(data: DataConfig) -> Files:
    """The files of all sources that `data` names, none of them read.

    Raises ValueError naming field or file, value and cure.
    """
    parts = [(one.source, one.split, "data.source") for one in data.mix]
    places = parts or [(data.source, data.split, "data.source")]
    if data.heldout is not None and not _fraction(data.heldout):
        places = [_heldout_place(data), *places]
    return {place: find_source(data, *place) for place in places}


def load_examples(data: DataConfig, seed: int, files: Files | None = None) -> Loaded:
    """Read, check, shuffle and take the rows that `data` asks for.

    `files`: from `find_files`, if the caller has them.

    Raises ValueError naming field or file, value and cure.
    """
    files = find_files(data) if files is None else files
    if data.heldout is None or _fraction(data.heldout):
        apart = None
    else:
        apart = _heldout(data, seed, files)
    if not data.mix:
        return _load(data, seed, files, apart)
    parts: list[Loaded] = []
    mixed: list[MixedPart] = []
    for number, one in enumerate(data.mix, start=1):
        own = {"source": one.source, "split": one.split, "rows": one.rows}
        part = _load(data.model_copy(update=own), seed, files, apart, f"{number}/")
        copies = _copies(part.train, one.weight, seed)
        mixed.append(MixedPart(part.source, one.weight, len(copies), f"{number}/"))
        parts.append(replace(part, train=copies))
    heldout = parts[0].heldout if apart else tuple(one for part in parts for one in part.heldout)
    skipped, heldout_skipped = Counter[str](), Counter[str]()
    for part in parts:
        skipped.update(part.skipped)
        heldout_skipped.update(part.heldout_skipped)
    return Loaded(
        train=tuple(example for part in parts for example in part.train),
        heldout=heldout,
        source=", ".join(part.source for part in parts),
        heldout_source=parts[0].heldout_source
        if apart
        else ", ".join(part.heldout_source or "" for part in parts)
        if data.heldout is not None
        else None,
        format=", ".join(dict.fromkeys(part.format for part in parts)),
        total=sum(part.total for part in parts),
        heldout_total=parts[0].heldout_total if apart else sum(p.heldout_total for p in parts),
        skipped=dict(skipped),
        heldout_skipped=parts[0].heldout_skipped if apart else dict(heldout_skipped),
        exact_across=sum(part.exact_across for part in parts),
        notes=tuple(f"{part.source}: {note}" for part in parts for note in part.notes),
        mixed=tuple(mixed),
    )


def _copies(examples: Sequence[Example], weight: float, seed: int) -> tuple[Example, ...]:
    """Each example `weight` times; copies have ids of their own."""
    whole = int(weight)
    more = round((weight - whole) * len(examples))
    chosen = set(order(range(len(examples)), seed, "mix")[:more])
    copies = []
    for place, example in enumerate(examples):
        times = whole + (place in chosen)
        copies += [
            replace(example, row_id=example.row_id + (f"+{time}" if time > 1 else ""))
            for time in range(1, times + 1)
        ]
    if not copies:
        raise ValueError(
            f"data.mix: weight = {weight:g} of {len(examples)} rows is no row; raise the weight"
        )
    return tuple(copies)


Apart = tuple[Source, Taken]  # held-out rows that have a source of their own


def _read(data: DataConfig, files: Files, place: Place) -> Source:
    return read_source(files[place], data, place[0], place[2])


def _heldout(data: DataConfig, seed: int, files: Files) -> Apart:
    """Held-out rows of another split or file."""
    source = _read(data, files, _heldout_place(data))
    indices = list(range(len(source.rows)))
    drawn = order(indices, seed, "heldout_rows") if data.shuffle else indices
    reading = reading_of(source.columns, data, source.name)
    return source, take(source, drawn, reading, data, data.heldout_rows, "data.heldout_rows")


def _load(
    data: DataConfig, seed: int, files: Files, apart: Apart | None, prefix: str = ""
) -> Loaded:
    """Rows of one source. `apart`: held-out rows of another one."""
    source = _read(data, files, (data.source, data.split, "data.source"))
    reading = reading_of(source.columns, data, source.name)
    indices = list(range(len(source.rows)))
    heldout_source, heldout = apart or (None, Taken((), 0, {}))
    if data.heldout is not None and apart is None:
        drawn, indices = _drawn(data, indices, seed)
        heldout_source = source
        heldout = take(source, drawn, reading, data, data.heldout_rows, "data.heldout_rows", prefix)
    known = {key(example): example.row_id for example in heldout.examples}
    train_order = order(indices, seed, "rows") if data.shuffle else indices
    train = take(source, train_order, reading, data, data.rows, "data.rows", prefix, known)
    return Loaded(
        train=train.examples,
        heldout=heldout.examples,
        source=source.name,
        heldout_source=None if heldout_source is None else heldout_source.name,
        format=reading.kind,
        total=train.total,
        heldout_total=heldout.total,
        skipped={reason: rows for reason, rows in train.skipped.items() if reason != ACROSS},
        heldout_skipped=heldout.skipped,
        exact_across=train.skipped.get(ACROSS, 0),
        notes=_notes(source, reading, train),
    )


def _drawn(data: DataConfig, indices: list[int], seed: int) -> tuple[list[int], list[int]]:
    """Held-out rows of a fraction in their order, and rows left."""
    fraction = float(data.heldout or 0)
    drawn = order(indices, seed, "heldout")
    count = round(fraction * len(indices))
    if not 0 < count < len(indices):
        raise ValueError(
            f"data.heldout = {fraction} of {len(indices)} rows is {count}: no rows are left on one "
            "side; choose another"
        )
    return order(drawn[:count], seed, "heldout_rows"), sorted(drawn[count:])


def _notes(source: Source, reading: Reading, train: Taken) -> tuple[str, ...]:
    """Sentences on how a source was read."""
    read = ", ".join(f"{role}={shown(name)}" for role, name in reading.columns.items())
    unread = [f"columns {listed(reading.unread)}"] if reading.unread else []
    unread += [f"keys of messages {listed(train.unread)}"] if train.unread else []
    text = f"columns read: {read}" + (f"; not read: {'; '.join(unread)}" if unread else "")
    whole = ("every row is a text, trained whole",) if reading.kind == "text" else ()
    counted = (f"{count:,} {note}" for note, count in train.notes.items())
    return (text, *whole, *source.notes, *counted)


def _heldout_place(data: DataConfig) -> Place:
    place = str(data.heldout)
    if names_files(place):
        return place, "heldout", "data.heldout"
    if data.mix:
        raise ValueError(
            f"data.heldout = {place}: with data.mix it is a file or a fraction (0.1), not a split"
        )
    if place == data.split:
        raise ValueError(
            f"data.heldout = {place} is also data.split: held-out rows may not be trained on; "
            "choose another split or a fraction"
        )
    if names_files(data.source):
        raise ValueError(
            f"data.heldout = {place}: data.source = {data.source} names files, which have no "
            "splits; give a file or a fraction (0.1)"
        )
    return data.source, place, "data.heldout"


def _fraction(heldout: str | float) -> float | None:
    """`data.heldout` as a fraction; None for a split or file."""
    try:
        fraction = float(heldout)
    except ValueError:
        return None
    if not 0 < fraction < 1:
        raise ValueError(
            f"data.heldout = {heldout}: a fraction must lie between 0 and 1 (for example 0.1)"
        )
    return fraction
