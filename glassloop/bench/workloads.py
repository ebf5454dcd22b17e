"""Named sets of rows for timing, equal on every machine.

Nothing is downloaded, and nothing here imports torch.

A name carries its version: a change of lengths or ids makes a new one, so that rows of results stay
comparable.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence

from glassloop.data.rows import Row

# (share of rows, tokens): lengths lie on straight lines between these points. scam: measured on 616
# rows of BothBosu/scam-dialogue under
# the r1 template and its tokenizer. medical: log-normal around 600 tokens, cut at 2,048, the shape
# of question, reasoning and answer.
QUANTILES: dict[str, tuple[tuple[float, int], ...]] = {
    "full-v1": ((0.0, 2048), (1.0, 2048)),
    "scam-v1": (
        (0.0, 231),
        (0.25, 353),
        (0.5, 423),
        (0.75, 530),
        (0.9, 599),
        (0.99, 634),
        (1.0, 647),
    ),
    "medical-v1": (
        (0.0, 190),
        (0.05, 286),
        (0.25, 443),
        (0.5, 600),
        (0.75, 813),
        (0.95, 1258),
        (1.0, 2048),
    ),
}
# Share of a row's tokens, its last ones.
SUPERVISED = {"full-v1": 0.8, "scam-v1": 0.8, "medical-v1": 0.8}
OWN = "own"  # the rows of data.source, as a run would read them
LOWEST_ID = 10  # ids below are often special


def workload(name: str, rows: int, *, vocabulary: int) -> tuple[Row, ...]:
    """`rows` rows of a named workload with ids in [LOWEST_ID, vocabulary).

    Raises ValueError for an unknown name.
    """
    if name not in QUANTILES:
        raise ValueError(f"workload = {name} is unknown: choose one of {', '.join(QUANTILES)}")
    drawn = random.Random(f"{name}:lengths")
    result = []
    for index in range(rows):
        length = _at(QUANTILES[name], drawn.random())
        ids = random.Random(f"{name}:{index}").choices(range(LOWEST_ID, vocabulary), k=length)
        prompt = length - max(1, round(length * SUPERVISED[name]))
        result.append(
            Row(f"{name}:{index}", tuple(ids), (False,) * prompt + (True,) * (length - prompt))
        )
    return tuple(result)


def _at(points: Sequence[tuple[float, int]], share: float) -> int:
    """The length that `share` of the rows do not exceed."""
    place = min(bisect_right([p for p, _ in points], share), len(points) - 1)
    (low, short), (high, long) = points[place - 1], points[place]
    return round(short + (long - short) * (share - low) / (high - low))
