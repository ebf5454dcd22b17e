"""Tokenised rows of a run, and what there is to say of them in numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from glassloop.config.config import DataConfig
from glassloop.data.rows import Example, Row
from glassloop.data.sources import Loaded
from glassloop.data.templates import Template, fit

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class RowSet:
    """Rows on one side of the line between training and held-out, each with the example that it comes from."""

    rows: tuple[Row, ...]
    examples: tuple[Example, ...]  # aligned with rows
    dropped: tuple[str, ...]  # ids of rows left out for their length
    cut: int  # rows cut at max_tokens
    untouched_tokens: tuple[
        int, ...
    ]  # length of every row before any was dropped or cut, ascending

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))

    @property
    def supervised_tokens(self) -> int:
        return sum(row.supervised_tokens for row in self.rows)


@dataclass(frozen=True)
class Dataset:
    train: RowSet
    heldout: RowSet
    loaded: Loaded
    template: Template


def build_rows(loaded: Loaded, template: Template, data: DataConfig) -> Dataset:
    """Templates and tokenises all examples; long rows go by `data.too_long`. Raises ValueError where no training row is left."""
    train, heldout = (
        _row_set(examples, template, data) for examples in (loaded.train, loaded.heldout)
    )
    for part, examples, what in (
        (train, loaded.train, "training"),
        (heldout, loaded.heldout, "held-out"),
    ):
        if examples and not part.rows:
            raise ValueError(
                f"data.max_tokens = {data.max_tokens}: all {len(examples)} {what} rows are longer (the shortest has "
                f"{part.untouched_tokens[0]} tokens); raise data.max_tokens or set data.too_long=cut"
            )
    return Dataset(train, heldout, loaded, template)


def quantiles(values: Sequence[int]) -> dict[float, int]:
    """Share -> the smallest of the ascending `values` such that this share of them is not above it; empty where there are
    none."""
    return {
        share: values[max(0, math.ceil(share * len(values) - 1e-9) - 1)]
        for share in QUANTILES
        if values
    }


def summary(dataset: Dataset, data: DataConfig) -> list[str]:
    """Lines that say what was taken, left out, cut and supervised: what `glassloop data` and the header of a run print."""
    loaded, train, heldout = dataset.loaded, dataset.train, dataset.heldout
    answers = [
        turn
        for example in (*loaded.train, *loaded.heldout)
        for turn in example.turns
        if turn.role == "assistant"
    ]
    reasoned = sum(turn.reasoning is not None for turn in answers)
    shuffled = "shuffled by seed" if data.shuffle else "in the source's order"
    took = f"took {len(loaded.train):,} of {loaded.total:,} rows, {shuffled}" + _list(
        loaded.skipped, "; skipped "
    )
    lines = [("source", f"{loaded.source}, format {loaded.format}: {took}")]
    if loaded.heldout_source is not None:
        took = f"took {len(loaded.heldout):,} of {loaded.heldout_total:,} rows" + _list(
            loaded.heldout_skipped, "; skipped "
        )
        lines.append(("held-out", f"{loaded.heldout_source}: {took}"))
    opening = ", so the prompt opens <think>" if dataset.template.opens_think else ""
    auto = f" (auto: {dataset.template.why})" if dataset.template.why else ""
    lines.append(
        (
            "template",
            f"{dataset.template.name}{auto}; {reasoned:,} of {len(answers):,} assistant turns have reasoning{opening}",
        )
    )
    for name, part in (("training", train), ("held-out", heldout)):
        if part.rows:
            lines += _lengths(name, part, data)
    lines.append(
        (
            "duplicates",
            f"{loaded.repeated:,} exact within training, {loaded.heldout_repeated:,} exact within held-out",
        )
    )
    if heldout.rows:
        near = "".join(
            f"; {train_id} ~ {heldout_id}" for train_id, heldout_id in loaded.near_across[:3]
        )
        across = f"{loaded.exact_across:,} exact across (left out of training), {len(loaded.near_across):,} near across{near}"
        lines.append(("", across))
    if loaded.labels:
        lines.append(
            (
                "labels",
                f"training: {_list(loaded.labels)}" + _list(loaded.heldout_labels, "; held-out: "),
            )
        )
    return [f"{name:<12} {text}" for name, text in lines]


def _row_set(examples: Sequence[Example], template: Template, data: DataConfig) -> RowSet:
    whole = template.encode_many(examples)
    fitted = [fit(row, data.max_tokens, data.too_long) for row in whole]
    kept = [
        (row, example) for row, example in zip(fitted, examples, strict=True) if row is not None
    ]
    return RowSet(
        rows=tuple(row for row, _ in kept),
        examples=tuple(example for _, example in kept),
        dropped=tuple(
            row.row_id for row, fit_row in zip(whole, fitted, strict=True) if fit_row is None
        ),
        cut=sum(row.truncated for row, _ in kept),
        untouched_tokens=tuple(sorted(map(len, whole))),
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
            f"{len(part.rows):,} rows kept, {len(part.dropped):,} dropped, {part.cut:,} cut at {data.max_tokens:,} tokens",
        ),
        ("", f"tokens a row before that: {', '.join(tokens)}"),
        ("", f"{part.supervised_tokens:,} of {part.tokens:,} tokens supervised ({share:.1%})"),
    ]


def _list(counts: dict[str, int], before: str = "") -> str:
    listed = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    return before + listed if listed else ""
