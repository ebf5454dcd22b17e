"""What a window of past values leads one to expect of the next: a least squares line, and Student's t for how surprising a value is.

A line and not a mean, because loss and norm move over a run: around a mean, what the curve does in the window would count as scatter and
hide a spike. Plain float arithmetic in a fixed order: equal inputs give equal answers on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

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


def student_tail(t: float, degrees: int) -> float:
    """P(T >= t) for Student's t. With T = sqrt(degrees) / tan(a) it is the integral of sin(a)^(degrees - 1), done by Simpson's rule (1e-6)."""
    if t < 0:
        return 1.0 - student_tail(-t, degrees)
    angle = math.atan2(math.sqrt(degrees), t)
    steps = 200
    values = [math.sin(angle * i / steps) ** (degrees - 1) for i in range(steps + 1)]
    area = (
        angle
        / steps
        / 3
        * (values[0] + values[-1] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2]))
    )
    return (
        area
        * math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2))
        / math.sqrt(math.pi)
    )


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
    """y at x against the line through the points: Student's t of a new value, which knows how few points the line stands on.

    widen: the new value's own sigma over that of the points.
    """
    line = fit(xs, ys)
    sigma = max(line.sigma, LEAST_SIGMA)
    expected = line.mean_y + line.slope * (x - line.mean_x)
    error = sigma * math.sqrt(widen**2 + 1 / line.points + (x - line.mean_x) ** 2 / line.spread)
    return Forecast(expected, sigma, (y - expected) / error, line.points - 2)
