"""Tokenised rows of a run, and their numbers for people."""

from __future__ import annotations

import hashlib
import math
import shlex
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from glassloop.config import DataConfig
from glassloop.data.duplicates import HeldoutRuns, repeated
from glassloop.data.facts import Facts, facts_of, together
from glassloop.data.names import listed
from glassloop.data.rows import Example, Row, RowFault
from glassloop.data.sources import Loaded
from glassloop.data.stored import lengths_of, supervised_of
from glassloop.data.taking import Faults
from glassloop.data.templates import Template, fit

DIGITS = 16  # of a digest of rows, hexadecimal
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class RowSet:
    """Rows on one side of the line between training and held-out.

    Attributes:
        examples: What each row comes from, aligned with rows. A file of rows holds the first ones.
        dropped: Ids of rows left out for their length.
        cut: Rows cut at max_tokens.
        untouched_tokens: Length of every row before any was dropped or cut, ascending.
        faulty: Fault -> rows that the template cannot write, left out.
        facts: Counts over examples.
    """

    rows: Sequence[Row]
    examples: Sequence[Example]
    dropped: tuple[str, ...]
    cut: int
    untouched_tokens: Sequence[int]
    faulty: dict[str, int]
    facts: Facts

    @property
    def tokens(self) -> int:
        return sum(lengths_of(self.rows))

    @property
    def supervised_tokens(self) -> int:
        return sum(supervised_of(self.rows))


@dataclass(frozen=True)
class Dataset:
    """Rows of a run. Counts are of rows that are kept.

    Attributes:
        digest: 16 hex digits over ids, tokens and labels of all rows.
        repeated: Training rows that exactly repeat another training row.
        heldout_repeated: The same of held-out rows.
        near_across: (training row id, held-out row id) of near duplicates.
    """

    train: RowSet
    heldout: RowSet
    loaded: Loaded
    template: Template
    digest: str
    repeated: int = 0
    heldout_repeated: int = 0
    near_across: tuple[tuple[str, str], ...] = ()


@dataclass
class Written:
    """Some examples as rows.

    Attributes:
        rows, examples: Those that are kept, aligned.
        dropped: Ids of rows left out for their length.
        untouched_tokens: Length of every row before any was dropped or cut.
        faults: Of examples that the template cannot write.
    """

    rows: list[Row] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    untouched_tokens: list[int] = field(default_factory=list)
    faults: list[RowFault] = field(default_factory=list)


def write_rows(examples: Sequence[Example], template: Template, data: DataConfig) -> Written:
    """Template and tokenise examples; long rows go by `data.too_long`."""
    written = Written()
    for row, example in zip(template.try_encode(examples), examples, strict=True):
        if isinstance(row, RowFault):
            written.faults.append(row)
            continue
        written.untouched_tokens.append(len(row))
        kept = fit(row, data.max_tokens, data.too_long)
        if kept is None:
            written.dropped.append(row.row_id)
        else:
            written.rows.append(kept)
            written.examples.append(example)
    return written


def build_rows(loaded: Loaded, template: Template, data: DataConfig) -> Dataset:
    """Template and tokenise all examples, in memory.

    Raises ValueError for rows that the template cannot write, unless data.on_bad_row=skip, and if
    no row of a side is left.
    """
    train = _row_set(loaded.train, loaded.source, "training", template, data)
    heldout = _row_set(loaded.heldout, loaded.source, "held-out", template, data)
    digest = hashlib.sha256()
    for row in (*train.rows, *heldout.rows):
        digest.update(digested(row))
    return Dataset(
        train,
        heldout,
        loaded,
        template,
        digest.hexdigest()[:DIGITS],
        repeated=repeated(train.examples),
        heldout_repeated=repeated(heldout.examples),
        near_across=tuple(HeldoutRuns(heldout.examples).near(train.examples)),
    )


def digested(row: Row) -> bytes:
    """What a digest of rows covers of one row."""
    return row.row_id.encode() + array("i", row.input_ids).tobytes() + bytes(row.supervised)


def require_rows(
    source: str,
    side: str,
    data: DataConfig,
    *,
    examples: int,
    kept: int,
    untouched_tokens: Sequence[int],
    faulty: dict[str, int],
) -> None:
    """Raise ValueError if none of a side's examples is kept.

    `untouched_tokens`: ascending.
    """
    if examples and not len(untouched_tokens):
        raise ValueError(
            f"{source}: none of {examples:,} {side} rows can be written "
            f"({_list(faulty)}); correct them or choose another data.template"
        )
    if examples and not kept:
        raise ValueError(
            f"data.max_tokens = {data.max_tokens}: all {len(untouched_tokens)} {side} rows are "
            f"longer (the shortest has {untouched_tokens[0]} tokens); raise data.max_tokens or set "
            "data.too_long=cut"
        )


def _row_set(
    examples: Sequence[Example], source: str, side: str, template: Template, data: DataConfig
) -> RowSet:
    written = write_rows(examples, template, data)
    faults = Faults(data)
    for fault in written.faults:
        faults.add(fault)
    faults.refuse(len(examples))
    found = RowSet(
        rows=tuple(written.rows),
        examples=tuple(written.examples),
        dropped=tuple(written.dropped),
        cut=sum(row.truncated for row in written.rows),
        untouched_tokens=tuple(sorted(written.untouched_tokens)),
        faulty=dict(faults.kinds()),
        facts=facts_of(written.examples, template.codec, data.answer_tokens),
    )
    require_rows(
        source,
        side,
        data,
        examples=len(examples),
        kept=len(found.rows),
        untouched_tokens=found.untouched_tokens,
        faulty=found.faulty,
    )
    return found


def quantiles(values: Sequence[int]) -> dict[float, int]:
    """Quantiles of ascending `values`, each a value that occurs; empty without values."""
    return {
        share: values[max(0, math.ceil(share * len(values) - 1e-9) - 1)]
        for share in QUANTILES
        if values
    }


def summary(dataset: Dataset, data: DataConfig) -> list[str]:
    """Lines on what was taken, left out, cut and supervised, for people."""
    loaded, train, heldout = dataset.loaded, dataset.train, dataset.heldout
    shuffled = "shuffled by seed" if data.shuffle else "in the source's order"
    took = f"took {len(loaded.train):,} of {loaded.total:,} rows, {shuffled}" + _list(
        loaded.skipped, "; skipped "
    )
    lines = [("source", f"{loaded.source}, format {loaded.format}: {took}")]
    lines += [("", note) for note in loaded.notes]
    for part in loaded.mixed:
        lines.append(("mix", f"{part.name}: {part.rows:,} rows an epoch (weight {part.weight:g})"))
    if loaded.heldout_source is not None:
        took = f"took {len(loaded.heldout):,} of {loaded.heldout_total:,} rows" + _list(
            loaded.heldout_skipped, "; skipped "
        )
        lines.append(("held-out", f"{loaded.heldout_source}: {took}"))
    lines += _template_lines(dataset)
    for name, part in (("training", train), ("held-out", heldout)):
        if part.rows:
            lines += _lengths(name, part, data)
    lines.append(
        (
            "duplicates",
            f"{dataset.repeated:,} exact within training, {dataset.heldout_repeated:,} exact "
            "within held-out",
        )
    )
    if heldout.rows:
        near = "".join(
            f"; {train_id} ~ {heldout_id}" for train_id, heldout_id in dataset.near_across[:3]
        )
        across = (
            f"{loaded.exact_across:,} exact across (left out of training), "
            f"{len(dataset.near_across):,} near across{near}"
        )
        lines.append(("", across))
    if labels := dict(sorted(train.facts.labels.items())):
        held = _list(dict(sorted(heldout.facts.labels.items())), "; held-out: ")
        lines.append(("labels", f"training: {_list(labels)}{held}"))
    return [f"{name:<12} {text}" for name, text in lines]


def _template_lines(dataset: Dataset) -> list[tuple[str, str]]:
    """How rows are written, and what their text spells without becoming it."""
    template = dataset.template
    facts = together((dataset.train.facts, dataset.heldout.facts))
    opening = ", so the prompt opens <think>" if template.opens_think else ""
    have = f"{facts.reasoned:,} of {facts.answers:,} assistant turns have reasoning{opening}"
    auto = f" (auto: {template.why})" if template.why else ""
    lines = [("template", f"{template.name}{auto}; {have}")]
    several = facts.answers > len(dataset.train.rows) + len(dataset.heldout.rows)
    if template.drops_earlier and facts.reasoned and several:
        cure = (
            "" if template.labels == "last" else "; data.labels=last learns the last answer alone"
        )
        lines.append(("", f"it leaves out the reasoning before a row's last question{cure}"))
    if facts.offered and not template.writes_tools:
        lines.append(
            ("", f"the tools of {facts.offered:,} rows are not written: it lists no tools")
        )
    if spelled := facts.spelled:
        names = listed(sorted(spelled, key=lambda name: (-spelled[name], name)), 3)
        cure = shlex.quote(",".join(facts.answers_spell[:3]))
        use = f"; data.answer_tokens={cure} lets answers use them" if facts.answers_spell else ""
        lines.append(
            ("", f"{facts.spelling:,} rows spell control tokens ({names}), which stay text{use}")
        )
    return lines


def _lengths(name: str, part: RowSet, data: DataConfig) -> list[tuple[str, str]]:
    words = {0.0: "min", 0.5: "median", 1.0: "max"}
    tokens = [
        f"{words.get(share, f'{share:.0%}')} {value:,}"
        for share, value in quantiles(part.untouched_tokens).items()
    ]
    share = part.supervised_tokens / part.tokens
    return [
        (
            name,
            f"{len(part.rows):,} rows kept, {len(part.dropped):,} dropped, {part.cut:,} cut at "
            f"{data.max_tokens:,} tokens" + _list(part.faulty, "; left out "),
        ),
        ("", f"tokens a row before that: {', '.join(tokens)}"),
        ("", f"{part.supervised_tokens:,} of {part.tokens:,} tokens supervised ({share:.1%})"),
    ]


def _list(counts: dict[str, int], before: str = "") -> str:
    listed = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    return before + listed if listed else ""
