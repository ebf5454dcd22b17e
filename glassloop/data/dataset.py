"""Tokenised rows of a run, and their numbers for people."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from glassloop.config import DataConfig
from glassloop.data.duplicates import near_duplicates, repeated
from glassloop.data.names import listed
from glassloop.data.rows import Example, Row, RowFault
from glassloop.data.sources import Loaded
from glassloop.data.taking import Faults
from glassloop.data.templates import Template, fit

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class RowSet:
    """Rows on one side of the line between training and held-out.

    Attributes:
        examples: What each row comes from, aligned with rows.
        dropped: Ids of rows left out for their length.
        cut: Rows cut at max_tokens.
        untouched_tokens: Length of every row before any was dropped or cut, ascending.
        faulty: Fault -> rows that the template cannot write, left out.
    """

    rows: tuple[Row, ...]
    examples: tuple[Example, ...]
    dropped: tuple[str, ...]
    cut: int
    untouched_tokens: tuple[int, ...]
    faulty: dict[str, int]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))

    @property
    def supervised_tokens(self) -> int:
        return sum(row.supervised_tokens for row in self.rows)


@dataclass(frozen=True)
class Dataset:
    """Rows of a run. Counts are of rows that are kept.

    Attributes:
        repeated: Training rows that exactly repeat another training row.
        heldout_repeated: The same of held-out rows.
        near_across: (training row id, held-out row id) of near duplicates.
    """

    train: RowSet
    heldout: RowSet
    loaded: Loaded
    template: Template
    repeated: int = 0
    heldout_repeated: int = 0
    near_across: tuple[tuple[str, str], ...] = ()


def build_rows(loaded: Loaded, template: Template, data: DataConfig) -> Dataset:
    """Template and tokenise all examples; long rows go by `data.too_long`.

    Raises ValueError for rows that the template cannot write, unless data.on_bad_row=skip, and if
    no row of a side is left.
    """
    train, heldout = (
        _row_set(examples, template, data) for examples in (loaded.train, loaded.heldout)
    )
    for part, examples, what in (
        (train, loaded.train, "training"),
        (heldout, loaded.heldout, "held-out"),
    ):
        if examples and not part.untouched_tokens:
            raise ValueError(
                f"{loaded.source}: none of {len(examples):,} {what} rows can be written "
                f"({_list(part.faulty)}); correct them or choose another data.template"
            )
        if examples and not part.rows:
            raise ValueError(
                f"data.max_tokens = {data.max_tokens}: all {len(part.untouched_tokens)} {what} "
                f"rows are longer (the shortest has {part.untouched_tokens[0]} tokens); raise "
                "data.max_tokens or set data.too_long=cut"
            )
    return Dataset(
        train,
        heldout,
        loaded,
        template,
        repeated=repeated(train.examples),
        heldout_repeated=repeated(heldout.examples),
        near_across=tuple(near_duplicates(train.examples, heldout.examples)),
    )


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
    lines += _template_lines(dataset, data)
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
    if labels := _balance(train.examples):
        held = _list(_balance(heldout.examples), "; held-out: ")
        lines.append(("labels", f"training: {_list(labels)}{held}"))
    return [f"{name:<12} {text}" for name, text in lines]


def _template_lines(dataset: Dataset, data: DataConfig) -> list[tuple[str, str]]:
    """How rows are written, and what their text spells without becoming it."""
    template = dataset.template
    examples = (*dataset.train.examples, *dataset.heldout.examples)
    answers = [turn for one in examples for turn in one.turns if turn.role == "assistant"]
    reasoned = sum(turn.reasoning is not None for turn in answers)
    opening = ", so the prompt opens <think>" if template.opens_think else ""
    have = f"{reasoned:,} of {len(answers):,} assistant turns have reasoning{opening}"
    auto = f" (auto: {template.why})" if template.why else ""
    lines = [("template", f"{template.name}{auto}; {have}")]
    offered = sum(one.tools is not None for one in examples)
    if offered and not template.writes_tools:
        lines.append(("", f"the tools of {offered:,} rows are not written: it lists no tools"))
    spelled: Counter[str] = Counter()  # control token -> rows whose text spells it
    answers_spell: set[str] = set()
    rows = 0
    for one in examples:
        found: set[str] = set()
        for turn in one.turns:
            here = template.codec.spelled(turn.content)
            if turn.role in ("assistant", "text"):
                here -= set(data.answer_tokens)
                answers_spell |= here
            found |= here
        spelled.update(found)
        rows += bool(found)
    if spelled:
        names = listed(sorted(spelled, key=lambda name: (-spelled[name], name)), 3)
        cure = shlex.quote(",".join(sorted(answers_spell)[:3]))
        use = f"; data.answer_tokens={cure} lets answers use them" if answers_spell else ""
        lines.append(("", f"{rows:,} rows spell control tokens ({names}), which stay text{use}"))
    return lines


def _row_set(examples: Sequence[Example], template: Template, data: DataConfig) -> RowSet:
    faults = Faults(data)
    whole: list[Row] = []
    written: list[Example] = []
    for row, example in zip(template.try_encode(examples), examples, strict=True):
        if isinstance(row, RowFault):
            faults.add(row)
        else:
            whole.append(row)
            written.append(example)
    faults.refuse(len(examples))
    fitted = [fit(row, data.max_tokens, data.too_long) for row in whole]
    kept = [(row, example) for row, example in zip(fitted, written, strict=True) if row is not None]
    return RowSet(
        rows=tuple(row for row, _ in kept),
        examples=tuple(example for _, example in kept),
        dropped=tuple(
            row.row_id for row, fit_row in zip(whole, fitted, strict=True) if fit_row is None
        ),
        cut=sum(row.truncated for row, _ in kept),
        untouched_tokens=tuple(sorted(map(len, whole))),
        faulty=dict(faults.kinds()),
    )


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


def _balance(examples: Sequence[Example]) -> dict[str, int]:
    """Class -> rows; empty if rows have no class."""
    labels = (example.label for example in examples if example.label is not None)
    return dict(sorted(Counter(labels).items()))


def _list(counts: dict[str, int], before: str = "") -> str:
    listed = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    return before + listed if listed else ""
