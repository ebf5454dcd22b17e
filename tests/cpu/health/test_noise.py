"""The gradient noise scale converges to the exact one, ragged parts included."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glassloop.health.noise import NoiseScale, estimates

# Tokens whose gradients are known: mean G, independent coordinates of these deviations.
MEAN = (0.3, -0.2, 0.1, 0.0, 0.25, -0.1)
DEVIATIONS = (1.0, 0.5, 2.0, 0.8, 1.2, 0.3)
TRACE = sum(d * d for d in DEVIATIONS)
SQUARED = sum(m * m for m in MEAN)
RAGGED = ((3, 40), (17, 5), (1, 60), (25, 25), (10, 2))


def norm(vector: list[float]) -> float:
    return math.sqrt(math.fsum(x * x for x in vector))


def update(tokens: tuple[int, ...], drawn: random.Random) -> tuple[list[float], list[int], float]:
    """An update's part norms, part tokens and norm: part p's share is the sum of its tokens'
    gradients over N."""
    n = sum(tokens)
    shares = [
        [drawn.gauss(t * m, math.sqrt(t) * d) / n for m, d in zip(MEAN, DEVIATIONS, strict=True)]
        for t in tokens
    ]
    return (
        [norm(share) for share in shares],
        list(tokens),
        norm([math.fsum(column) for column in zip(*shares, strict=True)]),
    )


@pytest.mark.parametrize(
    "sizes",
    [((20, 20),), RAGGED, ((5, 9, 30, 1), (0, 12, 3, 8))],
    ids=["two equal", "ragged", "four, one empty"],
)
def test_the_two_estimates_have_no_bias(sizes: tuple[tuple[int, ...], ...]) -> None:
    drawn = random.Random(1)
    found = [estimates(*update(sizes[i % len(sizes)], drawn)) for i in range(40_000)]
    within, squared = (
        math.fsum(values) / len(found)
        for values in zip(*[pair for pair in found if pair], strict=True)
    )
    assert within == pytest.approx(TRACE, rel=0.02)
    assert squared == pytest.approx(SQUARED, rel=0.1)


@pytest.mark.parametrize("sizes", [((400, 400),), ((700, 100), (50, 750))], ids=["equal", "ragged"])
def test_the_smoothed_ratio_converges_to_the_exact_noise_scale(
    sizes: tuple[tuple[int, ...], ...],
) -> None:
    drawn, scale = random.Random(2), NoiseScale(decay=0.9995)
    for i in range(15_000):
        scale.add(*update(sizes[i % len(sizes)], drawn))
    assert scale.tokens == pytest.approx(TRACE / SQUARED, rel=0.05)


def test_it_is_exact_where_every_token_of_a_linear_model_is_known() -> None:
    """Squared error of y = w x with w = 0: a token's gradient is -x y, its mean and variance over
    the four tokens are exact numbers.

    Averaged over every way to draw an update of 1 + 2 tokens with replacement, both estimates give
    exactly those.
    """
    gradients = [-x * y for x, y in ((1.0, 2.0), (2.0, 1.5), (-1.0, 0.5), (3.0, 1.0))]
    mean = sum(gradients) / 4
    variance = sum((g - mean) ** 2 for g in gradients) / 4
    found = []
    for a in gradients:
        for b in gradients:
            for c in gradients:
                found.append(estimates([abs(a) / 3, abs(b + c) / 3], [1, 2], abs(a + b + c) / 3))
    within, squared = (
        math.fsum(values) / len(found)
        for values in zip(*[pair for pair in found if pair], strict=True)
    )
    assert within == pytest.approx(variance, rel=1e-12)
    assert squared == pytest.approx(mean * mean, rel=1e-12)


@given(
    st.lists(st.integers(1, 500), min_size=2, max_size=6),
    st.lists(st.floats(-3, 3), min_size=3, max_size=3),
)
def test_tokens_that_all_agree_have_no_noise_however_ragged(
    tokens: list[int], mean: list[float]
) -> None:
    n = sum(tokens)
    found = estimates([norm(mean) * t / n for t in tokens], tokens, norm(mean))
    assert found is not None
    assert found[0] == pytest.approx(0, abs=1e-9 * n)
    assert found[1] == pytest.approx(norm(mean) ** 2, abs=1e-9)


@pytest.mark.parametrize(
    ("norms", "tokens", "whole"),
    [
        ([1.0], [5], 1.0),
        ([1.0, 0.0], [5, 0], 1.0),
        ([], [], 0.0),
        ([math.nan, 1.0], [5, 5], 1.0),
        ([1.0, 1.0], [5, 5], math.inf),
    ],
    ids=["one part", "one with tokens", "none", "a part not finite", "the norm not finite"],
)
def test_an_update_that_says_nothing_changes_nothing(
    norms: list[float], tokens: list[int], whole: float
) -> None:
    scale = NoiseScale()
    scale.add([0.6, 0.7], [4, 6], 1.2)
    before = scale.state()
    scale.add(norms, tokens, whole)
    assert scale.state() == before


def test_it_is_none_before_the_first_update_and_where_noise_drowns_the_gradient() -> None:
    scale = NoiseScale()
    assert scale.tokens is None
    scale.add([1.0, 1.0], [5, 5], 0.1)  # shares that cancel: |G|^2 comes out negative
    assert scale.squared < 0
    assert scale.tokens is None


def test_its_state_goes_on_where_it_was() -> None:
    drawn, whole = random.Random(3), NoiseScale()
    updates = [update((30, 50), drawn) for _ in range(40)]
    for one in updates[:20]:
        whole.add(*one)
    resumed = NoiseScale()
    resumed.restore(json.loads(json.dumps(whole.state())))
    for one in updates[20:]:
        whole.add(*one)
        resumed.add(*one)
    assert resumed.state() == whole.state()


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"within": "x", "squared": 1, "updates": 1},
        {"within": math.nan, "squared": 1, "updates": 1},
        None,
    ],
)
def test_a_malformed_state_is_refused_and_changes_nothing(state: Any) -> None:
    scale = NoiseScale()
    scale.add([0.6, 0.7], [4, 6], 1.2)
    before = scale.state()
    with pytest.raises(ValueError, match="leave it out"):
        scale.restore(state)
    assert scale.state() == before


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan])
def test_a_decay_that_forgets_nothing_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="decay"):
        NoiseScale(decay)
