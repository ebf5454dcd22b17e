"""A run's time on a CPU, held to two measured runs."""

from __future__ import annotations

import re

import pytest

from glassloop.config.arguments import parse
from glassloop.plan.outlook import look_ahead, plan_of
from glassloop.plan.overview import RowFacts, overview_lines
from glassloop.plan.work import TokenCounts
from glassloop.predict.cpu import Answers, CpuSpeed, answering_s, measuring_s, training_s
from glassloop.predict.shapes import known_shapes

# Two ranks of one thread: 110.5 GFLOP/s each in a product, 0.25 ns a weight of a linear layer.
MEASURED = CpuSpeed(flops_per_s=2 * 110.5e9, weight_s=0.25e-9)
UNITS = {"s": 1, "min": 60, "h": 3600}


def foretold(words: list[str], rows: RowFacts, counts: TokenCounts) -> tuple[float, float]:
    """Seconds to train and to evaluate or answer, as printed."""
    config = parse(words, prog="test")
    outlook = look_ahead(config, plan_of(config, rows.rows, 2), rows_from="", counts=counts)
    lines = overview_lines(outlook, rows, cpu=MEASURED)
    text = " ".join(" ".join(lines).split())
    said = r"about (\S+) (s|min|h) to train on this CPU, at most (\S+) (s|min|h)"
    found = re.search(said, text)
    assert found, text
    train, unit, more, other = found.groups()
    return float(train) * UNITS[unit], float(more) * UNITS[other]


def facts(rows: int, median: int, share: float, heldout: int) -> RowFacts:
    return RowFacts("rows", "scam", "chat", rows, {}, median, median, 0, share, heldout)


MINE = ["smollm2_demo"], facts(77, 302, 0.1, 19), (18_300, 18_900)
CSV = (
    ["data.source=qa.csv", "model.id=smollm2", "--hardware", "cpu"],
    facts(100, 72, 0.3, 0),
    (7_232, 7_350),
)


@pytest.mark.parametrize(
    ("run", "trained_s", "more_s"),
    [(MINE, 65, 60), (CSV, 25.4, 27)],
    ids=["the demo", "a csv of 100 rows"],
)
def test_a_run_takes_what_was_foretold_within_a_factor_of_1_5(
    run: tuple[list[str], RowFacts, tuple[int, int]], trained_s: float, more_s: float
) -> None:
    """Measured are CPU seconds of a rank.

    They are seconds where nothing else runs."""
    words, rows, (real, slots) = run
    counts = TokenCounts(real, real // 5, slots, 50, real, 50, 2, 300, 60, 600)
    train, more = foretold(words, rows, counts)
    assert 1 / 1.5 < train / trained_s < 1.5
    assert 1 / 1.5 < (train + more) / (trained_s + more_s) < 1.5


def test_answers_take_the_batches_of_the_rank_that_has_most() -> None:
    shapes = known_shapes("smollm2")
    assert shapes is not None

    def seconds(rows: int, ranks: int = 2, batch: int = 2, times: int = 1) -> float:
        return answering_s(shapes, Answers(times, rows, 10), MEASURED, ranks=ranks, batch=batch)

    one = seconds(1)
    assert one == pytest.approx(
        10 * ((106_168_320 + 28_311_552) * 0.25e-9 + 210 * 2.5e-4), rel=1e-6
    )
    assert seconds(0) == 0
    assert [round(seconds(rows) / one) for rows in (2, 4, 5, 9)] == [1, 1, 2, 3]
    assert seconds(9, ranks=1, batch=1, times=2) == pytest.approx(18 * one)
    assert measuring_s(1e12, MEASURED) == pytest.approx(0.4 * training_s(1e12, MEASURED))
