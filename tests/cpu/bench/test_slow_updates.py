"""The benchmark of slow updates plants what it says; the one of added costs holds its mark."""

from __future__ import annotations

import random

import added_cost
import pytest
import slow_drawn
from slow_drawn import PLANTED, Drawn, clean, hits, update_of

from glassloop.health.slowness import CAUSES


@pytest.mark.parametrize("cause", PLANTED)
def test_a_planted_cause_makes_an_update_as_much_longer_as_asked_and_is_named(cause: str) -> None:
    how = Drawn(2, 0.0)
    usual, _ = update_of(random.Random(1), how, 1)
    late, machine = update_of(random.Random(1), how, 1, cause=cause, factor=3.0)
    assert late.update_s == pytest.approx(3.0 * usual.update_s)
    assert machine is not None and late.update_s > late.compute_s
    assert slow_drawn.NAMED.get(cause, cause) in CAUSES
    found = hits(how, cause, 3.0, runs=5)
    assert (found["seen"], found["named"], found["rank_right"]) == (5, 5, 5)


def test_sound_updates_of_little_scatter_raise_nothing_and_wild_ones_are_counted() -> None:
    calm, wild = (clean(Drawn(1, sigma), runs=3, updates=200) for sigma in (0.01, 0.5))
    assert (calm["false_alarms"], calm["runs_with_one"]) == (0, 0)
    assert wild["runs_with_one"] == 3 and wild["a_thousand_updates"] > 10


def test_the_sampler_takes_at_most_two_thousandths_of_an_update() -> None:
    """Its own processor time, which other work on the machine does not lengthen much."""
    found = min(
        (added_cost.sampler_cost() for _ in range(3)), key=lambda one: one["cpu_s_an_update"]
    )
    assert found["held"], found
