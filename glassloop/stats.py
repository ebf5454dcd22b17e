"""Student's t, intervals, and forecasts, in plain float arithmetic.

A forecast stands on a least squares line and not on a mean, because loss and norm move over a run:
around a mean, what the curve does in the window would count as scatter and hide a spike. The order
of operations is fixed, so equal inputs give equal answers on every rank. Intervals take rows as
independent draws, and hold with 95 %.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

Z95 = 1.959963984540054  # of the normal distribution, two-sided
RESAMPLES = 2000
Interval = tuple[float, float]
LEAST_SIGMA = 0.05  # of a logarithm: no window is trusted to be narrower than 5 %


class Forecast(NamedTuple):
    """A value against what the window leads one to expect; logarithms."""

    expected: float
    sigma: float  # of the window's entries around its line
    t: float  # (value - expected) / standard error of the forecast
    degrees: int  # of freedom

    @property
    def above(self) -> float:
        """Chance that a sound value lies this far above."""
        return student_tail(self.t, self.degrees)

    @property
    def below(self) -> float:
        return student_tail(-self.t, self.degrees)


class Line(NamedTuple):
    """Least squares line through points."""

    mean_x: float
    mean_y: float
    slope: float
    spread: float  # sum of (x - mean_x)^2
    sigma: float  # of the points around it, n - 2 degrees of freedom
    points: int


def fit(xs: Sequence[float], ys: Sequence[float]) -> Line:
    """Line through at least three points of different x."""
    n = len(xs)
    mean_x, mean_y = math.fsum(xs) / n, math.fsum(ys) / n
    spread = math.fsum((x - mean_x) ** 2 for x in xs)
    slope = math.fsum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    rest = math.fsum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in zip(xs, ys, strict=True))
    return Line(mean_x, mean_y, slope, spread, math.sqrt(rest / (n - 2)), n)


def forecast(
    xs: Sequence[float], ys: Sequence[float], x: float, y: float, widen: float = 1.0
) -> Forecast:
    """Compare y at x with the line through the points.

    Student's t knows how few points the line stands on.

    widen: the new value's own sigma over that of the points.
    """
    line = fit(xs, ys)
    sigma = max(line.sigma, LEAST_SIGMA)
    expected = line.mean_y + line.slope * (x - line.mean_x)
    error = sigma * math.sqrt(widen**2 + 1 / line.points + (x - line.mean_x) ** 2 / line.spread)
    return Forecast(expected, sigma, (y - expected) / error, line.points - 2)


def student_tail(t: float, degrees: float) -> float:
    """Return P(T >= t) of Student's t, for any degrees > 0.

    By the regularised incomplete beta function (Abramowitz and Stegun 26.7.1), which keeps its
    relative precision far out in the tail.
    """
    if t < 0:
        return 1.0 - student_tail(-t, degrees)
    return 0.5 * _beta(degrees / (degrees + t * t), degrees / 2, 0.5)


def student_quantile(share: float, degrees: float) -> float:
    """Return t with P(T <= t) = share, for share > 0.5.

    By bisection, to 1e-9 relative, for any degrees of freedom > 0.
    """
    assert 0.5 < share < 1 and degrees > 0
    low, high = 0.0, 1.0
    while 1 - student_tail(high, degrees) < share:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if 1 - student_tail(middle, degrees) < share:
            low = middle
        else:
            high = middle
        if high - low <= 1e-10 * high:
            break
    return (low + high) / 2


def wilson(hits: int, rows: int) -> Interval | None:
    """Return the 95 % interval of a share (Wilson 1927).

    None without rows.
    """
    if rows == 0:
        return None
    share, z2 = hits / rows, Z95**2
    middle = (share + z2 / (2 * rows)) / (1 + z2 / rows)
    half = Z95 / (1 + z2 / rows) * math.sqrt(share * (1 - share) / rows + z2 / (4 * rows**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p of McNemar (1947).

    The hypothesis is that two systems are right equally often; rows on which one alone is right
    decide.
    """
    discordant, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(discordant, k) for k in range(fewer + 1)) / 2**discordant
    return min(1.0, 2 * tail)


def bootstrap(
    rows: int, statistic: Callable[[Sequence[int]], float | None], seed: int = 0
) -> Interval | None:
    """Return the 95 % percentile interval of `statistic` (Efron 1979).

    It is a function of the row numbers drawn, and paired if it looks at two systems per row.

    None with fewer than two rows, where all draws have one value, or where more than one in twenty
    has none.
    """
    if rows < 2:
        return None
    drawn = random.Random(seed)
    values = [statistic(drawn.choices(range(rows), k=rows)) for _ in range(RESAMPLES)]
    known = sorted(value for value in values if value is not None)
    if (
        len(known) < 0.95 * RESAMPLES or known[0] == known[-1]
    ):  # all draws alike: nothing is known of the spread
        return None
    return known[math.floor(0.025 * (len(known) - 1))], known[math.ceil(0.975 * (len(known) - 1))]


def _beta(x: float, a: float, b: float) -> float:
    """Return I_x(a, b) by its continued fraction.

    Abramowitz and Stegun 26.5.8, evaluated by Lentz's method.
    """
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta(1 - x, b, a)
    front = (
        math.exp(
            math.lgamma(a + b)
            - math.lgamma(a)
            - math.lgamma(b)
            + a * math.log(x)
            + b * math.log(1 - x)
        )
        / a
    )
    tiny = 1e-300
    c, d = 1.0, 1 - (a + b) * x / (a + 1)
    d = 1 / (d if abs(d) > tiny else tiny)
    value = d
    for m in range(1, 500):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 + numerator * d
            d = 1 / (d if abs(d) > tiny else tiny)
            c = 1 + numerator / c
            c = c if abs(c) > tiny else tiny
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * value
