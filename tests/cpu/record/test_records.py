"""Records are frozen plain values, one line of JSON each."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from plain_records import update_record

from glassloop.record.records import (
    SCHEMA,
    EvaluationRecord,
    Event,
    RowRecord,
    to_json,
)

RECORDS = [
    update_record(12),
    RowRecord(
        update=12,
        rank=1,
        micro_batch=2,
        row_id="train:17",
        loss_sum_nats=3.5,
        supervised_tokens=5,
        real_tokens=9,
    ),
    Event(
        update=12,
        kind="warning",
        message="look",
        command="glassloop data",
        details={"deep": [{"a": (1, 2)}]},
    ),
    EvaluationRecord(
        update=12,
        loss_nats=2.0,
        rows=4,
        supervised_tokens=50,
        scores={"f1": None},
        base={"f1": 0.5},
    ),
]


def strict(line: str) -> dict[str, Any]:
    """Parse JSON strictly: NaN and Infinity are refused."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_is_frozen_and_its_line_carries_every_field_schema_and_attempt(
    record: Any,
) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.update = 99
    line = strict(to_json(record))
    assert set(line) == {field.name for field in dataclasses.fields(record)}
    assert (line["schema"], line["attempt"], line["update"]) == (SCHEMA, 1, 12)


def test_what_does_not_exist_is_null_and_never_zero() -> None:
    line = strict(
        to_json(
            update_record(
                rank_grad_norm=None, rank_cosine=None, loss_nats=None, rank_loss_nats=(None, 3.0)
            )
        )
    )
    assert line["rank_grad_norm"] is None
    assert line["rank_cosine"] is None
    assert line["loss_nats"] is None
    assert line["rank_loss_nats"] == [None, 3.0]


@pytest.mark.parametrize(
    ("value", "word"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")]
)
def test_a_number_that_is_not_finite_is_written_and_readable(value: float, word: str) -> None:
    line = strict(to_json(update_record(12, loss_nats=value, rank_loss_nats=(1.0, value))))
    assert line["loss_nats"] == word
    assert line["rank_loss_nats"] == [1.0, word]
    assert str(float(line["loss_nats"])) == word
    assert strict(to_json(Event(1, "warning", "m", details={"a": {"b": [value]}})))["details"] == {
        "a": {"b": [word]}
    }


def test_numbers_come_back_bit_for_bit() -> None:
    loss, norm = 2.1234567890123457, 1e-17 / 3
    line = strict(to_json(update_record(12, loss_nats=loss, grad_norm_pre_clip=norm)))
    assert (line["loss_nats"], line["grad_norm_pre_clip"]) == (loss, norm)


def test_text_of_any_kind_stays_on_one_line() -> None:
    message = 'two\nlines, a return \r, a quote ", a null \0, \x1b[2J, ｜, 🦙'
    line = to_json(Event(1, "warning", message))
    assert "\n" not in line
    assert "\r" not in line
    assert strict(line)["message"] == message
    assert "🦙" in line  # readable as it stands, not as escapes


def test_real_slot_and_supervised_tokens_are_told_apart_and_rates_are_over_all_ranks() -> None:
    record = update_record(12)
    assert (record.supervised_tokens, record.real_tokens, record.slot_tokens) == (400, 600, 2000)
    assert record.supervised_tokens == sum(record.rank_supervised_tokens)
    assert (
        record.real_tokens_per_s == 300.0
    )  # both ranks' rows over the wall time; padding does not count
    assert math.isnan(update_record(12, update_s=0.0).real_tokens_per_s)
