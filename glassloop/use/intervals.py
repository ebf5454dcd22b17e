"""How sure a measured share or difference is: Wilson's interval, the exact McNemar test, the paired bootstrap over rows.

Rows are taken as independent draws; 95 % throughout. Nothing here imports torch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

Z95 = 1.959963984540054  # of the normal distribution, two-sided
RESAMPLES = 2000
Interval = tuple[float, float]


def wilson(hits: int, rows: int) -> Interval | None:
    """95 % interval of a share (Wilson 1927). None where there are no rows."""
    if rows == 0:
        return None
    share, z2 = hits / rows, Z95**2
    middle = (share + z2 / (2 * rows)) / (1 + z2 / rows)
    half = Z95 / (1 + z2 / rows) * math.sqrt(share * (1 - share) / rows + z2 / (4 * rows**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p that two systems are right equally often, from the rows on which one alone is right (McNemar 1947, binomial)."""
    discordant, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(discordant, k) for k in range(fewer + 1)) / 2**discordant
    return min(1.0, 2 * tail)


def bootstrap(
    rows: int, statistic: Callable[[Sequence[int]], float | None], seed: int = 0
) -> Interval | None:
    """95 % percentile interval of `statistic`, a function of the row numbers drawn (Efron 1979). Paired where it looks at two systems per row.

    None with fewer than two rows, where all draws have one value, or where more than one in twenty has none.
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
