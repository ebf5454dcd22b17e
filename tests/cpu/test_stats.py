"""Student's t and intervals agree with tables and closed forms."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glassloop.stats import bootstrap, mcnemar, student_quantile, student_tail, wilson


@pytest.mark.parametrize(
    ("degrees", "t", "chance"),
    [(19, 2.0930, 0.025), (19, 3.8834, 0.0005), (6, 5.2076, 0.001), (18, 1.7341, 0.05)],
)
def test_the_tail_of_students_t_is_that_of_the_tables(
    degrees: int, t: float, chance: float
) -> None:
    assert student_tail(t, degrees) == pytest.approx(chance, rel=1e-3)


@given(st.floats(0, 1e4))
def test_the_tail_is_exact_where_it_has_a_closed_form(t: float) -> None:
    assert student_tail(t, 1) == pytest.approx(math.atan2(1, t) / math.pi, rel=1e-5)
    root = math.sqrt(2 + t * t)
    assert student_tail(t, 2) == pytest.approx(
        1 / (root * (root + t)), rel=1e-5
    )  # (1 - t / root) / 2, without its cancellation
    assert student_tail(-t, 2) == pytest.approx(1 - student_tail(t, 2), abs=1e-9)


def test_students_t_is_that_of_the_tables() -> None:
    for degrees, t in (
        (1, 12.706205),
        (2, 4.302653),
        (4, 2.776445),
        (10, 2.228139),
        (30, 2.042272),
        (1000, 1.962339),
    ):
        assert student_quantile(0.975, degrees) == pytest.approx(t, rel=1e-6)
        assert student_tail(t, degrees) == pytest.approx(0.025, abs=1e-7)


def test_wilson_is_the_published_interval():
    low, high = wilson(8, 10) or (0, 0)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert wilson(0, 0) is None
    assert (wilson(0, 4) or (1, 0))[0] == 0


def test_mcnemar_is_the_exact_binomial():
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 1024)
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1


def test_the_bootstrap_covers_the_mean_and_is_paired():
    values = [float(i % 10) for i in range(200)]
    low, high = bootstrap(200, lambda drawn: sum(values[i] for i in drawn) / len(drawn)) or (0, 0)
    half = 1.96 * math.sqrt(8.25 / 200)
    assert low == pytest.approx(4.5 - half, abs=0.06) and high == pytest.approx(
        4.5 + half, abs=0.06
    )
    assert bootstrap(200, lambda drawn: 1.0) is None  # no spread is known
    other = [value - 1 + 0.01 * (i % 3) for i, value in enumerate(values)]
    low, high = bootstrap(
        200, lambda drawn: sum(other[i] - values[i] for i in drawn) / len(drawn)
    ) or (0, 0)
    assert -1 <= low < high < -0.98  # far narrower than either mean's
