"""Student's t distribution, as far as an interval needs it; the standard library has none."""

from __future__ import annotations

import math


def students_quantile(share: float, degrees: float) -> float:
    """t with P(T <= t) = share for share > 0.5 and any degrees of freedom > 0, to 1e-9 relative; by bisection."""
    assert 0.5 < share < 1 and degrees > 0
    low, high = 0.0, 1.0
    while students_cdf(high, degrees) < share:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if students_cdf(middle, degrees) < share:
            low = middle
        else:
            high = middle
        if high - low <= 1e-10 * high:
            break
    return (low + high) / 2


def students_cdf(t: float, degrees: float) -> float:
    """P(T <= t) for t >= 0, from the regularised incomplete beta function (Abramowitz and Stegun 26.7.1)."""
    x = degrees / (degrees + t * t)
    return 1 - 0.5 * _beta(x, degrees / 2, 0.5)


def _beta(x: float, a: float, b: float) -> float:
    """I_x(a, b), by its continued fraction (Abramowitz and Stegun 26.5.8), evaluated by Lentz's method."""
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
