"""What the detectors see and what leaves them silent: spikes, vanishing gradients, no learning,
tails, warmup, new levels."""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest

from glassloop.config import StabilityConfig
from glassloop.health.signals import Finding, Signals
from glassloop.health.stability import (
    DIVERGED_UPDATES,
    LEAST_ENTRIES,
    NEW_LEVEL_UPDATES,
    VANISHING_UPDATES,
    Detectors,
)
from glassloop.stats import LEAST_SIGMA, forecast

DEFAULTS = {
    name: getattr(StabilityConfig(), name)
    for name in ("window_updates", "false_alarm_rate", "no_learning_updates")
}
Told = list[tuple[int, str]]


def detectors(**changes: Any) -> Detectors:
    return Detectors(**{"rows_per_update": 16, "warmup_updates": 5, **DEFAULTS, **changes})


def sound(
    updates: int = 60, *, sigma: float = 0.1, fall: float = 0.3, seed: int = 0, tails: bool = True
) -> list[Signals]:
    """A run whose log norm and log loss scatter by sigma; its loss falls by `fall` to the end.
    Every 8th window is a tail of 8 rows."""
    drawn = random.Random(seed)
    result = []
    for u in range(1, updates + 1):
        rows = 8 if tails and u % 8 == 0 else 16
        wide = math.sqrt(16 / rows)
        loss = 2.0 * (1 - fall * u / updates) * math.exp(sigma * wide * drawn.gauss(0, 1))
        norm = 0.8 * wide * math.exp(sigma * wide * drawn.gauss(0, 1))
        result.append(
            Signals(
                update=u,
                lr=2e-4,
                rows=rows,
                supervised_tokens=25 * rows,
                loss_nats=loss,
                grad_norm=norm,
            )
        )
    return result


def told(
    series: Iterable[Signals],
    watching: Detectors | None = None,
    *,
    applied: Callable[[Finding], bool] = lambda _: True,
) -> Told:
    """(update, kind) of all findings; an update with a finding moves the optimizer where `applied`
    says so."""
    watching = watching or detectors()
    found = []
    for signals in series:
        findings = watching.look(signals)
        watching.note(signals, findings, all(map(applied, findings)))
        found += [(signals.update, finding.kind) for finding in findings]
    return found


def at(update: int, series: list[Signals], **factors: float) -> list[Signals]:
    """The series with fields of one update multiplied."""
    return [
        replace(s, **{name: getattr(s, name) * factor for name, factor in factors.items()})
        if s.update == update
        else s
        for s in series
    ]


def since(
    update: int, series: list[Signals], **change: Callable[[Signals], float]
) -> list[Signals]:
    """The series with fields changed from one update on."""
    return [
        replace(s, **{n: f(s) for n, f in change.items()}) if s.update >= update else s
        for s in series
    ]


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


# Vanishing gradients.


def test_a_gradient_of_exactly_0_is_told_at_once_and_once() -> None:
    for update in (1, 3, 30, 32):  # in warmup and in a tail too
        assert told(since(update, sound(), grad_norm=lambda s: 0.0)) == [
            (update, "vanishing_gradient")
        ]


def test_no_loss_and_no_gradient_is_nothing_to_tell() -> None:
    assert told(since(30, sound(), grad_norm=lambda s: 0.0, loss_nats=lambda s: 0.0)) == []


@pytest.mark.parametrize("factor", [0.05, 0.005])
def test_a_norm_that_falls_at_once_is_told_when_it_has_lasted(factor: float) -> None:
    series = since(30, sound(), grad_norm=lambda s: s.grad_norm * factor)
    whole = [s.update for s in series if s.update >= 30 and s.rows == 16]
    assert told(series) == [(whole[VANISHING_UPDATES - 1], "vanishing_gradient")]


@pytest.mark.parametrize("factor", [0.5, 0.7])
def test_a_norm_that_decays_is_told_however_slowly_it_goes(factor: float) -> None:
    """The window follows it down: only the highest level of the run shows it."""
    found = told(since(30, sound(), grad_norm=lambda s: s.grad_norm * factor ** (s.update - 29)))
    assert [kind for _, kind in found] == ["vanishing_gradient"]
    assert found[0][0] <= 30 + math.log(0.005) / math.log(factor) + VANISHING_UPDATES


def test_one_or_two_low_norms_are_nothing_to_tell() -> None:
    assert told(at(30, at(31, sound(), grad_norm=0.01), grad_norm=0.01)) == []


@pytest.mark.parametrize("factor", [0.05, 1e-3])
def test_a_norm_that_falls_in_warmup_is_not_told_there(factor: float) -> None:
    found = told(
        since(14, sound(), grad_norm=lambda s: s.grad_norm * factor), detectors(warmup_updates=30)
    )
    assert [update for update, _ in found if update <= 30] == []


def test_a_low_norm_does_not_widen_the_window() -> None:
    series = at(30, sound(), grad_norm=1e-3)
    assert told(at(31, series, grad_norm=4)) == [(31, "norm_spike")]


# No learning.


@pytest.mark.parametrize("sigma", [0.005, 0.02, 0.04])
def test_a_loss_that_stays_flat_is_told_in_most_runs(sigma: float) -> None:
    found = [told(sound(120, sigma=sigma, fall=0.0, seed=seed)) for seed in range(20)]
    assert {kind for run in found for _, kind in run} == {"no_learning"}
    assert sum(map(bool, found)) >= 12
    assert all(update > 5 + 40 for run in found for update, _ in run)


def test_it_says_how_flat_and_is_told_once_in_a_window() -> None:
    watching, messages = detectors(), []
    for signals in sound(140, sigma=0.01, fall=0.0, tails=False):
        findings = watching.look(signals)
        watching.note(signals, findings, True)
        messages += [(signals.update, finding.message) for finding in findings]
    updates = [update for update, _ in messages]
    assert len(updates) >= 2
    assert all(b - a >= 40 for a, b in itertools.pairwise(updates))
    assert "has not fallen over the" in messages[0][1]
    assert "+-" in messages[0][1]


@pytest.mark.parametrize("fall", [0.15, 0.3, 0.6])
def test_a_loss_that_falls_is_not_told(fall: float) -> None:
    assert [told(sound(sigma=0.06, fall=fall, seed=seed)) for seed in range(20)] == [[]] * 20


def test_a_loss_that_rises_is_told() -> None:
    assert "no_learning" in [kind for _, kind in told(sound(sigma=0.02, fall=-0.3))]


# Divergence.

# What SmolLM2 did in the first updates at lr = 5e-2, in nats a token, before any window is there to
# compare with.
TOO_HIGH_A_RATE = (
    3.85,
    4.14,
    10.14,
    12.27,
    16.62,
    16.27,
    15.93,
    22.85,
    83.53,
    33.41,
    14.84,
    15.59,
    12.64,
    13.21,
    12.14,
)


def losses(values: Iterable[float], rows: int = 16) -> list[Signals]:
    return [Signals(u, 2e-4, rows, 25 * rows, loss, 0.8) for u, loss in enumerate(values, start=1)]


def test_a_run_that_diverges_in_warmup_is_told_once_and_why() -> None:
    watching, found = detectors(), []
    for signals in losses(TOO_HIGH_A_RATE):
        findings = watching.look(signals)
        watching.note(signals, findings, True)
        found += [(signals.update, finding) for finding in findings]
    (update, finding) = found[0]
    assert (update, finding.kind) == (3 + DIVERGED_UPDATES - 1, "diverged")
    assert (
        "since update 3, 5 whole updates in a row, it has stood far above the 3.85 that "
        "the run began with" in finding.message
    )
    assert finding.details == {"value": 15.93, "start_nats": 3.85, "lr": 2e-4, "since": 3}
    assert [kind for _, kind in ((u, f.kind) for u, f in found)].count("diverged") == 1


def test_a_second_update_that_has_leapt_already_hides_nothing() -> None:
    assert (7, "diverged") in told(losses([3.8, 20.0, *[12.0] * 10]))


def test_it_is_told_again_once_the_loss_had_come_down() -> None:
    series = losses([2.0, 2.0, *[4.0] * 6, 1.9, *[4.0] * 6])
    watching, since = detectors(), {}
    for signals in series:
        findings = watching.look(signals)
        watching.note(signals, findings, True)
        for finding in findings:
            if finding.kind == "diverged":
                since[signals.update] = finding.details["since"]
    assert since == {7: 3, 14: 10}


@pytest.mark.parametrize(
    "values",
    [
        [2.0, 2.0, *[4.0] * 4, 1.9, *[4.0] * 4, 1.9],  # never five in a row
        [2.0, 2.0, *[2.95] * 20],  # above, and not far
        [0.01, 0.01, *[0.09] * 20],  # nine times nothing is nothing
        [2.0, 3.0, *[3.9] * 20],  # within what the first two scatter by
    ],
)
def test_a_loss_that_is_not_far_above_for_long_has_not_diverged(values: list[float]) -> None:
    assert "diverged" not in [kind for _, kind in told(losses(values))]


@pytest.mark.parametrize("tail", [5, 7])  # in the middle of the row, and where the fifth would be
def test_tails_neither_count_nor_break_the_row(tail: int) -> None:
    series = losses([2.0, 2.0, *[4.0] * 8])
    series[tail - 1] = replace(series[tail - 1], rows=8)
    assert [update for update, kind in told(series) if kind == "diverged"] == [8]


@pytest.mark.parametrize("sigma", [0.1, 0.2])
def test_a_run_that_learns_nothing_has_not_diverged(sigma: float) -> None:
    series = (sound(200, sigma=sigma, fall=0.0, seed=seed) for seed in range(50))
    assert sum("diverged" in [kind for _, kind in told(one)] for one in series) == 0


def test_the_row_of_high_losses_goes_on_after_a_checkpoint() -> None:
    first, second, series = detectors(), detectors(), losses([2.0, 2.0, *[4.0] * 8])
    told(series[:5], first)
    second.restore(json.loads(json.dumps(first.state())))
    assert told(series[5:], second) == [(7, "diverged")]
    assert second.above_since == 3
    older = {name: value for name, value in first.state().items() if name != "above_in_a_row"}
    second.restore(older)  # of a checkpoint from before there was such a thing
    assert (second.state()["above_in_a_row"], second.above_since) == (0, None)


INNOCENT = {
    "too short a run": (lambda: sound(44, sigma=0.01, fall=0.0), {}),
    "all of it warmup": (lambda: sound(60, sigma=0.01, fall=0.0), {"warmup_updates": 60}),
    "a longer window asked for": (
        lambda: sound(60, sigma=0.01, fall=0.0),
        {"no_learning_updates": 80},
    ),
    "lr of 0": (lambda: [replace(s, lr=0.0) for s in sound(60, sigma=0.01, fall=0.0)], {}),
    "lr of 0 at the end": (
        lambda: since(48, sound(60, sigma=0.01, fall=0.0), lr=lambda s: 0.0),
        {},
    ),
    "a slow but certain fall from a level that it had first to climb to": (
        lambda: since(6, sound(60, sigma=0.002, fall=0.04), loss_nats=lambda s: s.loss_nats * 1.2),
        {},
    ),
    "nothing left to learn": (
        lambda: [replace(s, loss_nats=s.loss_nats * 0.02) for s in sound(60, sigma=0.01, fall=0.0)],
        {},
    ),
    "noise that hides any fall": (lambda: sound(60, sigma=0.4, fall=0.0, seed=3), {}),
    "a start that was not seen": (
        lambda: [replace(s, update=s.update + 100) for s in sound(60, sigma=0.01, fall=0.0)],
        {},
    ),
}


@pytest.mark.parametrize(("series", "settings"), INNOCENT.values(), ids=INNOCENT)
def test_no_learning_stays_silent_where_it_cannot_know(
    series: Callable[[], list[Signals]], settings: dict[str, Any]
) -> None:
    assert told(series(), detectors(**settings)) == []


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
