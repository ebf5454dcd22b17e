"""Pack columns of numbers as text for the page.

Curves are float32; heat maps have 16-bit steps on a log scale.

The page decodes them (assets/data.js). Little-endian, base64. A value that does not exist is never
a number: NaN in a float32 column, 0 in a heat map. A value that exists and is not a number stands
in the column's list `nan`.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from glassloop.record.reading import number

HEAT_COLUMNS = 1000  # of a heat map at most: more than a screen can show
ABSENT, ZERO, NOT_FINITE, FIRST_STEP, LAST_STEP = 0, 1, 2, 3, 65535  # codes of a heat map's cells


def column(values: Iterable[Any]) -> dict[str, Any]:
    """Pack numbers as {"f32": base64, "nan": [index, ...]}.

    They keep about 7 digits. None is absent; "inf" and "-inf" stay what they are.
    """
    numbers = [number(value) for value in values]
    array = np.array([math.nan if value is None else value for value in numbers], dtype="<f4")
    return {
        "f32": _base64(array),
        "nan": [i for i, value in enumerate(numbers) if value is not None and math.isnan(value)],
    }


def whole_numbers(values: Sequence[int]) -> dict[str, str]:
    """{"u16" | "u32": base64}, whichever holds the largest of the counts."""
    kind, dtype = ("u16", "<u2") if max(values, default=0) < 2**16 else ("u32", "<u4")
    return {kind: _base64(np.array(values, dtype=dtype))}


def heat(values: Sequence[Sequence[Any] | None], rows: int) -> dict[str, Any] | None:
    """Pack a quantity of every matrix in every probe.

    None if no probe has it.

    Args:
        values: by probe, then by matrix. None: the probe has none of it, or the matrix has no
            value.
        rows: matrices.

    Returns:
        {"rows", "columns", "low", "high", "codes", "bins"}: codes are (rows, columns) in row order.
        Code 3 is `low`, 65535 is `high`, and the logarithm is linear between them; 0 absent, 1
        exactly zero, 2 not finite. `bins`: [first, last] probe of each column. Where there are more
        than HEAT_COLUMNS probes, a column shows the largest of its probes, so that no spike is
        lost.
    """
    grid = np.full((rows, len(values)), math.nan)
    exists = np.zeros((rows, len(values)), dtype=bool)
    for i, probe in enumerate(values):
        if probe is not None:
            grid[:, i] = [math.nan if value is None else float(value) for value in probe]
            exists[:, i] = [value is not None for value in probe]
    if not exists.any():
        return None
    grid[exists & ~np.isfinite(grid)] = math.inf
    edges = np.linspace(0, len(values), min(len(values), HEAT_COLUMNS) + 1).round().astype(int)
    spans = list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
    # -1: absent; norms, ratios and shares are never negative.
    joined = np.full((rows, len(spans)), -1.0)
    filled = np.where(exists, grid, -1.0)
    for i, (first, after) in enumerate(spans):
        joined[:, i] = filled[:, first:after].max(axis=1)
    positive = joined[(joined > 0) & np.isfinite(joined)]
    low, high = (float(positive.min()), float(positive.max())) if positive.size else (1.0, 1.0)
    codes = np.full(joined.shape, ABSENT, dtype="<u2")
    codes[joined == 0] = ZERO
    codes[np.isinf(joined)] = NOT_FINITE
    inside = (joined > 0) & np.isfinite(joined)
    span = math.log(high) - math.log(low)
    share = (
        (np.log(joined, where=inside, out=np.zeros_like(joined)) - math.log(low)) / span
        if span > 0
        else np.zeros_like(joined)
    )
    codes[inside] = np.rint(FIRST_STEP + share[inside] * (LAST_STEP - FIRST_STEP)).astype("<u2")
    bins = [[first, after - 1] for first, after in spans]
    return {
        "rows": rows,
        "columns": len(spans),
        "low": low,
        "high": high,
        "codes": _base64(codes),
        "bins": bins,
    }


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")
