"""Vanishing gradients, no learning and divergence are found; sound runs are not."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from signal_series import at, detectors, losses, since, sound, told

from glassloop.health.signals import Signals
from glassloop.health.stability import (
    DIVERGED_UPDATES,
    VANISHING_UPDATES,
)

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
