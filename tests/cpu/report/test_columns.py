"""Columns and heat maps keep every value in little room."""

from __future__ import annotations

import base64
import json
import math
import random
import re

import numpy as np
import pytest
from made_runs import EVIL
from plain_records import decoded

from glassloop.report.columns import FIRST_STEP, HEAT_COLUMNS, LAST_STEP, column, heat
from glassloop.report.page import as_data


def test_a_column_keeps_what_is_absent_apart_from_what_is_not_a_number() -> None:
    packed = column([1.5, None, "nan", "inf", 0])
    values = decoded(packed)
    assert values[0] == 1.5 and math.isnan(values[1]) and values[3] == math.inf and values[4] == 0
    assert packed["nan"] == [2]


def test_a_heat_map_keeps_absent_zero_and_not_finite_apart() -> None:
    packed = heat([[None, 0.0], [1e-4, "nan"], [1.0, 1e-2], None], 2)
    assert packed is not None
    codes = np.frombuffer(base64.b64decode(packed["codes"]), dtype="<u2").reshape(2, 4)
    assert codes.tolist() == [
        [0, FIRST_STEP, LAST_STEP, 0],
        [1, 2, FIRST_STEP + (LAST_STEP - FIRST_STEP) // 2, 0],
    ]
    assert (packed["low"], packed["high"]) == (1e-4, 1.0)
    assert heat([None, None], 2) is None


def test_a_heat_map_gives_values_back_and_loses_no_spike() -> None:
    drawn = random.Random(3)
    values = [[math.exp(drawn.gauss(0, 3)) for _ in range(3)] for _ in range(3 * HEAT_COLUMNS)]
    values[1234][1] = 1e9
    packed = heat(values, 3)
    assert (
        packed is not None
        and packed["columns"] == HEAT_COLUMNS
        and packed["bins"][0][0] == 0
        and packed["bins"][-1][1] == len(values) - 1
    )
    codes = (
        np.frombuffer(base64.b64decode(packed["codes"]), dtype="<u2")
        .reshape(3, HEAT_COLUMNS)
        .astype(float)
    )
    share = (codes - FIRST_STEP) / (LAST_STEP - FIRST_STEP)
    back = np.exp(np.log(packed["low"]) + share * (np.log(packed["high"]) - np.log(packed["low"])))
    for i, (first, last) in enumerate(packed["bins"]):
        assert back[:, i] == pytest.approx(np.array(values[first : last + 1]).max(axis=0), rel=1e-3)
    assert codes.max() == LAST_STEP


def test_markup_cannot_leave_the_data() -> None:
    text = as_data({"a": f"{EVIL} \u2028 \ud800", "<b>": "</SCRIPT><!--"})
    assert not re.search("[<>&\u2028]", text)
    assert json.loads(text)["a"] == f"{EVIL} \u2028 \ud800"
