"""What the detectors see and what leaves them silent: spikes, vanishing gradients, no learning,
tails, warmup, new levels."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from signal_series import at, detectors, since, sound, told

from glassloop.health.stability import (
    LEAST_ENTRIES,
    NEW_LEVEL_UPDATES,
)
from glassloop.stats import LEAST_SIGMA, forecast

# Arithmetic.


@pytest.mark.parametrize("widen", [1.0, math.sqrt(2)])
@pytest.mark.parametrize("entries", [8, 20])
def test_the_chance_is_right_for_the_size_of_the_window(entries: int, widen: float) -> None:
    """Of many sound values beside a window with a slope, one in a hundred has a chance below 1 %,
    however few entries there are."""
    drawn, low = random.Random(7), 0
    xs = [float(x) for x in range(entries)]
    for _ in range(8000):
        ys = [0.3 * x + drawn.gauss(0, 1) for x in xs]
        seen = forecast(xs, ys, entries, 0.3 * entries + drawn.gauss(0, widen), widen)
        low += seen.above < 0.01
    assert low / 8000 == pytest.approx(0.01, abs=0.004)


def test_the_forecast_is_the_least_squares_line_with_two_degrees_of_freedom_less() -> None:
    """By hand: y = 0, 1, 1, 2 at x = 0 .. 3 has slope 0.6 and mean 1 at 1.5; residuals 0.1, -0.3
    and their mirror; at 5 it forecasts 3.1."""
    seen = forecast([0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 1.0, 2.0], 5.0, 4.1)
    sigma = math.sqrt(0.2 / 2)
    assert (seen.expected, seen.sigma, seen.degrees) == (
        pytest.approx(3.1),
        pytest.approx(sigma),
        2,
    )
    assert seen.t == pytest.approx(1.0 / (sigma * math.sqrt(1 + 1 / 4 + 3.5**2 / 5)))


def test_no_window_is_trusted_to_be_narrower_than_5_percent() -> None:
    seen = forecast([1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0], 5.0, 1.1)
    assert seen.sigma == LEAST_SIGMA
    assert math.isfinite(seen.t)


# Sound runs.


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.25])
def test_sound_runs_with_tails_raise_no_alarm(sigma: float) -> None:
    assert [told(sound(sigma=sigma, seed=seed)) for seed in range(20)] == [[]] * 20


def test_a_run_that_learns_its_rows_by_heart_raises_no_alarm() -> None:
    """Loss and norm fall together by a factor of 50,000, and stay there."""
    series = [
        replace(s, loss_nats=s.loss_nats * fall, grad_norm=s.grad_norm * fall)
        for s in sound(120, fall=0.0)
        for fall in [math.exp(-0.18 * min(s.update, 60))]
    ]
    assert series[-1].loss_nats < 1e-4
    assert told(series) == []


def test_a_run_that_has_learned_may_stay_where_it_is() -> None:
    series = sound(200, fall=0.0)
    assert (
        told(
            [
                replace(s, loss_nats=s.loss_nats * (0.7 + 0.3 * math.exp(-s.update / 15)))
                for s in series
            ]
        )
        == []
    )


# Spikes.


@pytest.mark.parametrize("update", [14, 33, 60])
@pytest.mark.parametrize("factor", [3, 10, 50])
def test_a_spike_of_the_norm_is_told_with_its_numbers(update: int, factor: float) -> None:
    series, watching = at(update, sound(sigma=0.08), grad_norm=factor), detectors()
    for signals in series[: update - 1]:
        watching.note(signals, watching.look(signals), True)
    (finding,) = watching.look(series[update - 1])
    assert finding.kind == "norm_spike"
    assert finding.details["value"] == series[update - 1].grad_norm
    assert finding.details["value"] / finding.details["expected"] == pytest.approx(factor, rel=0.35)
    assert finding.details["chance"] < 1e-5
    for words in (
        f"{finding.details['value']:.4g}",
        f"{finding.details['expected']:.4g}",
        "times",
        "scatter by",
        "chance",
    ):
        assert words in finding.message
    json.dumps(finding.details, allow_nan=False)


@pytest.mark.parametrize("update", [14, 33, 60])
def test_one_row_of_sixteen_with_50_times_its_loss_is_told(update: int) -> None:
    assert told(at(update, sound(), loss_nats=(15 + 50) / 16)) == [(update, "loss_spike")]


@pytest.mark.parametrize("factor", [1.3, 1.8])
def test_what_is_small_is_no_spike_however_narrow_the_window(factor: float) -> None:
    assert told(at(30, sound(sigma=0.001), grad_norm=factor)) == []
    assert told(at(30, sound(sigma=0.001), grad_norm=2.5)) == [(30, "norm_spike")]
    assert told(at(30, sound(sigma=0.001), loss_nats=min(factor, 1.45))) == []
    assert told(at(30, sound(sigma=0.001), loss_nats=1.7)) == [(30, "loss_spike")]
    near_0 = [replace(s, loss_nats=s.loss_nats * 0.01) for s in sound(sigma=0.001)]
    assert told(at(30, near_0, loss_nats=4)) == []  # from 0.02 to 0.07 nats


def test_a_wide_window_asks_for_a_larger_leap() -> None:
    assert told(at(30, sound(sigma=0.05), grad_norm=3)) == [(30, "norm_spike")]
    assert told(at(30, sound(sigma=0.4, seed=1), grad_norm=3)) == []


def test_a_falling_loss_hides_no_spike() -> None:
    """From 6 to 0.6 over the run: around the window's mean its slope would count as scatter."""
    series = [
        replace(s, loss_nats=s.loss_nats / 2 * 6 * 0.1 ** (s.update / 60)) for s in sound(fall=0.0)
    ]
    assert told(series) == []
    assert told(at(25, series, loss_nats=3)) == [(25, "loss_spike")]


@pytest.mark.parametrize("warmup", [0, 5, 25])
def test_spikes_are_silent_in_warmup_and_until_the_window_has_enough_entries(warmup: int) -> None:
    series = sound(40, tails=False)
    first = max(warmup, LEAST_ENTRIES) + 1
    for update in range(1, first):
        assert (
            told(
                at(update, series, grad_norm=1e3, loss_nats=30)[:update],
                detectors(warmup_updates=warmup),
            )
            == []
        ), update
    assert told(at(first, series, grad_norm=1e3)[:first], detectors(warmup_updates=warmup)) == [
        (first, "norm_spike")
    ]


def test_a_spike_in_a_long_warmup_is_not_told_but_kept_out_of_the_window() -> None:
    series = at(25, at(20, sound(), grad_norm=1e3), grad_norm=5)
    assert told(series, detectors(warmup_updates=22)) == [(25, "norm_spike")]


def test_a_tail_may_be_noisier_but_not_without_bound() -> None:
    series, tail = sound(sigma=0.1, seed=4), 32
    assert series[tail - 1].rows == 8
    higher = math.exp(
        5 * 0.1
    )  # five sigma of a whole window, twice over: a whole window is told, the tail is not
    assert told(at(33, series, grad_norm=2.4)) == [(33, "norm_spike")]
    assert told(at(tail, series, grad_norm=2.4 / math.sqrt(2))) == []
    assert told(at(tail, series, loss_nats=higher)) == []
    assert told(at(tail, series, grad_norm=10)) == [(tail, "norm_spike")]
    assert told(at(tail, series, loss_nats=6)) == [(tail, "loss_spike")]


def test_a_tail_is_not_taken_into_the_window() -> None:
    watching, without = detectors(), detectors()
    series = at(24, sound(), grad_norm=1.4, loss_nats=1.4)
    told(series, watching)
    told([s for s in series if s.rows == 16], without)
    assert watching.state() == without.state()


def test_a_spike_does_not_poison_the_window() -> None:
    series = at(30, sound(), grad_norm=50, loss_nats=10)
    spiked, clean = detectors(), detectors()
    told(series[:30], spiked)
    told(series[:29], clean)
    assert spiked.window == clean.window
    assert spiked.usual_norm == clean.usual_norm
    assert told(at(31, series, grad_norm=5)) == [
        (30, "norm_spike"),
        (30, "loss_spike"),
        (31, "norm_spike"),
    ]


def test_a_lasting_new_level_is_accepted() -> None:
    series = since(30, sound(tails=False), grad_norm=lambda s: s.grad_norm * 20)
    watching = detectors()
    assert told(series, watching) == [(u, "norm_spike") for u in range(30, 30 + NEW_LEVEL_UPDATES)]
    assert watching.usual_norm == pytest.approx(0.8 * 20, rel=0.2)
    assert told(at(58, series, grad_norm=5))[-1] == (58, "norm_spike")


def test_now_and_then_a_spike_is_no_new_level() -> None:
    series = sound(tails=False)
    places = [u for u in range(20, 60) if u % 3 == 0]
    for update in places:
        series = at(update, series, grad_norm=20)
    assert told(series) == [(u, "norm_spike") for u in places]


def test_updates_that_were_left_out_are_not_taken_in_nor_make_a_new_level() -> None:
    series, watching = (
        since(30, sound(tails=False), grad_norm=lambda s: s.grad_norm * 20),
        detectors(),
    )
    found = told(series, watching, applied=lambda finding: finding.kind != "norm_spike")
    assert found == [(u, "norm_spike") for u in range(30, 61)]
    assert watching.usual_norm == pytest.approx(0.8, rel=0.2)


def test_the_usual_norm_is_the_geometric_mean_of_the_window() -> None:
    watching, series = detectors(), sound(tails=False)
    told(series[: LEAST_ENTRIES - 1], watching)
    assert watching.usual_norm is None
    told(series[LEAST_ENTRIES - 1 : 40], watching)
    assert watching.usual_norm == pytest.approx(
        statistics.geometric_mean([s.grad_norm for s in series[20:40]])
    )


def test_look_changes_nothing_and_gives_the_same_answer_again() -> None:
    watching = detectors()
    for signals in since(40, at(30, sound(), grad_norm=50), grad_norm=lambda s: s.grad_norm * 1e-3):
        before = watching.state()
        findings = watching.look(signals)
        assert watching.look(signals) == findings
        assert watching.state() == before
        watching.note(signals, findings, True)


# State.


@pytest.mark.parametrize("cut", [0, 4, 17, 31, 33, 46, 51])
def test_a_resumed_run_tells_the_same(cut: int) -> None:
    series = since(
        50,
        since(30, sound(sigma=0.03, fall=0.0), grad_norm=lambda s: s.grad_norm * 20),
        grad_norm=lambda s: s.grad_norm * 1e-3,
    )
    whole, first, second = detectors(), detectors(), detectors()
    expected = told(series, whole)
    begun = told(series[:cut], first)
    second.restore(json.loads(json.dumps(first.state(), allow_nan=False)))
    assert vars(second) == vars(first)
    assert begun + told(series[cut:], second) == expected
    assert vars(second) == vars(whole)
    assert {"norm_spike", "vanishing_gradient"} <= {kind for _, kind in expected}


MALFORMED = {
    "empty": lambda state: {},
    "not a dict": lambda state: [1],
    "an entry too short": lambda state: {**state, "window": [[1, 2.0]]},
    "a word": lambda state: {**state, "start": ["loss"]},
    "not finite": lambda state: {**state, "losses": [[1, math.nan]]},
    "nothing": lambda state: {**state, "low_in_a_row": None},
}


@pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_state_is_refused_with_the_cure_and_changes_nothing(
    change: Callable[[Any], Any],
) -> None:
    watching = detectors()
    told(sound(30), watching)
    before = watching.state()
    with pytest.raises(ValueError, match=r"malformed.*leave it out"):
        watching.restore(change(before))
    assert watching.state() == before


def test_a_smaller_window_keeps_the_newest_entries() -> None:
    long, short = detectors(window_updates=20), detectors(window_updates=10)
    told(sound(), long)
    short.restore(long.state())
    assert short.window == long.window[-10:]
