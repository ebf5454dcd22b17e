"""Adapter and base measured on the same rows, with intervals.

Rank r takes rows r, r + ranks, ...; results are gathered once, at the end, and every rank has them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from glassloop.data.rows import Example, Row
from glassloop.formula.dist import all_or_none, gather_objects
from glassloop.loop.evaluation import (
    Answer,
    answer_examples,
    in_row_order,
    row_losses,
    scores,
)
from glassloop.loop.generation import EvaluationSetup, unchanged
from glassloop.stats import Interval, bootstrap, mcnemar, wilson

if TYPE_CHECKING:
    from glassloop.use.loaded import Loaded

SIDES = ("base", "adapter")


@dataclass(frozen=True)
class Measured:
    """Losses and answers by side ("base", "adapter"), in the order of rows.

    Losses are nats, summed over a row's supervised tokens.
    """

    tokens: tuple[int, ...]  # supervised, of each row
    losses: dict[str, list[float]]
    answers: dict[str, list[Answer]]


@dataclass(frozen=True)
class Score:
    """One number of both sides, with its uncertainty.

    `intervals` and `difference` (adapter - base) are None if the rows do not give one.
    """

    name: str
    values: dict[str, float | None]
    intervals: dict[str, Interval | None]
    difference: Interval | None = None  # 95 % paired bootstrap over rows
    p: float | None = None  # exact McNemar, for accuracy


@dataclass(frozen=True)
class Report:
    """Results of `glassloop evaluate`, in plain values."""

    rows: int
    supervised_tokens: int
    answered: int
    verdict_rows: int
    scores: tuple[Score, ...]
    counts: dict[str, dict[str, float | None]] = field(default_factory=dict)  # by side: scores()


def measure(
    loaded: Loaded,
    rows: Sequence[Row],
    examples: Sequence[Example],
    setup: EvaluationSetup,
) -> Measured:
    """Measure `rows` and answer `examples` greedily, with and without the adapter.

    Every rank must call it.

    Raises:
        ValueError: no row has a supervised token, or a loss is not finite.
        RuntimeError: another rank failed.
    """
    tokens = tuple(row.supervised_tokens for row in rows)
    if not sum(tokens):
        raise ValueError(
            f"none of the {len(rows)} rows has a supervised token, so there is no loss: "
            "choose other rows"
        )
    rank, ranks = setup.rank, setup.ranks
    mine: dict[str, tuple[list[float], list[Answer]]] = {}
    with (
        all_or_none("evaluation") if ranks > 1 else nullcontext(),
        unchanged(loaded.engine, setup.device),
    ):
        for side in SIDES:
            with loaded.hf.disable_adapter() if side == "base" else nullcontext():
                losses = row_losses(loaded.engine, rows[rank::ranks], setup)
                answers = answer_examples(loaded.hf, examples[rank::ranks], setup)
            mine[side] = losses, answers
    shares = gather_objects(mine) if ranks > 1 else [mine]
    found = {side: in_row_order([share[side][0] for share in shares]) for side in SIDES}
    for side in SIDES:
        if odd := [place for place, loss in enumerate(found[side]) if not math.isfinite(loss)]:
            raise ValueError(
                f"the {side}'s loss is {found[side][odd[0]]} on row {odd[0]} ({len(odd)} such of "
                f"{len(rows)} rows), so it cannot be measured: choose another checkpoint (--at N)"
            )
    answered = {side: in_row_order([share[side][1] for share in shares]) for side in SIDES}
    return Measured(tokens, found, answered)


def report_of(measured: Measured, seed: int = 0) -> Report:
    """Scores with 95 % intervals; differences are paired by row."""
    tokens = measured.tokens
    found = [
        _bootstrapped(
            "loss_nats",
            lambda side, drawn: _token_mean(measured.losses[side], tokens, drawn),
            len(tokens),
            seed,
        )
    ]
    judged = {
        side: [one for one in measured.answers[side] if one.label is not None] for side in SIDES
    }
    verdicts = len(judged["adapter"])
    if verdicts:
        found += _verdict_scores(judged, verdicts, seed)
    counts = {}
    for side in SIDES:
        loss = math.fsum(measured.losses[side]) / sum(tokens)
        counts[side] = scores(measured.answers[side], loss_nats=loss)
    return Report(
        len(tokens), sum(tokens), len(measured.answers["adapter"]), verdicts, tuple(found), counts
    )


def _token_mean(
    losses: Sequence[float], tokens: Sequence[int], drawn: Sequence[int]
) -> float | None:
    total = sum(tokens[i] for i in drawn)
    return math.fsum(losses[i] for i in drawn) / total if total else None


def _bootstrapped(name: str, statistic: Any, rows: int, seed: int) -> Score:
    """Build a score whose value and difference come from `statistic(side, row numbers)`."""

    def difference(drawn: Sequence[int]) -> float | None:
        base, adapter = statistic("base", drawn), statistic("adapter", drawn)
        return None if base is None or adapter is None else adapter - base

    return Score(
        name,
        {side: statistic(side, range(rows)) for side in SIDES},
        {
            side: bootstrap(rows, lambda drawn, side=side: statistic(side, drawn), seed)
            for side in SIDES
        },
        bootstrap(rows, difference, seed),
    )


def _verdict_scores(judged: dict[str, list[Answer]], rows: int, seed: int) -> list[Score]:
    """Accuracy, precision and recall with Wilson's interval, F1 with the bootstrap's.

    Positive means scam; an answer without a verdict is wrong.
    """
    right = {side: [one.verdict == one.label for one in judged[side]] for side in SIDES}
    only = {
        side: sum(mine and not other for mine, other in zip(right[side], right[rest], strict=True))
        for side, rest in (SIDES, SIDES[::-1])
    }

    def counted(name: str, drawn_of: Any) -> Score:
        counts = {side: drawn_of(judged[side]) for side in SIDES}
        values = {side: hits / of if of else None for side, (hits, of) in counts.items()}

        def difference(drawn: Sequence[int]) -> float | None:
            pairs = [drawn_of([judged[side][i] for i in drawn]) for side in SIDES]
            return (
                None
                if not all(of for _, of in pairs)
                else pairs[1][0] / pairs[1][1] - pairs[0][0] / pairs[0][1]
            )

        p = mcnemar(only["base"], only["adapter"]) if name == "accuracy" else None
        return Score(
            name,
            values,
            {side: wilson(*counts[side]) for side in SIDES},
            bootstrap(rows, difference, seed),
            p,
        )

    def hits(answers: Sequence[Answer]) -> int:
        return sum(one.verdict == one.label == "scam" for one in answers)

    def alarms(answers: Sequence[Answer]) -> int:
        return sum(one.verdict == "scam" for one in answers)

    def scams(answers: Sequence[Answer]) -> int:
        return sum(one.label == "scam" for one in answers)

    def f1(side: str, drawn: Sequence[int]) -> float | None:
        some = [judged[side][i] for i in drawn]
        whole = alarms(some) + scams(some)
        return 2 * hits(some) / whole if whole else None

    return [
        counted(
            "accuracy", lambda some: (sum(one.verdict == one.label for one in some), len(some))
        ),
        counted("precision", lambda some: (hits(some), alarms(some))),
        counted("recall", lambda some: (hits(some), scams(some))),
        _bootstrapped("f1", f1, rows, seed),
    ]
