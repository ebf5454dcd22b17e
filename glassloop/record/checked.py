"""Check that a record has every field, each of its type."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable
from typing import Any

from glassloop.record.records import (
    EvaluationRecord,
    Event,
    MachineRecord,
    ProbeRecord,
    RowRecord,
    SampleRecord,
    UpdateRecord,
)

Kind = (
    type[UpdateRecord]
    | type[RowRecord]
    | type[ProbeRecord]
    | type[MachineRecord]
    | type[Event]
    | type[EvaluationRecord]
    | type[SampleRecord]
)
Test = Callable[[Any], bool]

MOST_COUNT = 2**32 - 1  # of rows, tokens, updates: columns of a report have 32 bits
LARGEST = 1e60  # of a number that is finite: its square's square still is
MOST_DEPTH = 100  # of values that have no kind of their own
NOT_FINITE = ("nan", "inf", "-inf")
ALWAYS_FINITE = {
    "lr",
    "update_s",
    "compute_s",
    "reduce_s",
    "optimizer_s",
    "rank_passes_s",
    "rank_peak_gib",
    "seconds",
}
OF_RANKS = (
    "rank_loss_nats",
    "rank_supervised_tokens",
    "rank_real_tokens",
    "rank_slot_tokens",
    "rank_passes",
    "rank_grad_norm",
    "rank_peak_gib",
    "rank_passes_s",
)
OF_MATRICES = (
    "matrices",
    "grad_norm",
    "weight_norm",
    "update_norm",
    "update_to_weight",
    "unmoved_share",
)
OF_MODULES = ("modules", "delta_norm")
OF_MACHINE = tuple(
    field.name for field in dataclasses.fields(MachineRecord) if field.name.startswith("rank_")
)
SAME_LENGTH = {  # fields of a kind whose lists have one entry for each of the same things
    UpdateRecord: (OF_RANKS,),
    ProbeRecord: (OF_MATRICES, OF_MODULES),
    MachineRecord: (OF_MACHINE,),
}


def check(record: dict[str, Any], kind: Kind, where: str) -> dict[str, Any]:
    """Return the record with its kind's fields, defaults filled in.

    A row's text is kept too. Raises ValueError naming `where`, the field and its value.
    """
    for name, test, words, default in _fields(kind):
        if name not in record:
            if default is dataclasses.MISSING:
                raise ValueError(f"{where}: {name} is missing; {_CURE}")
            record[name] = default
        elif not test(record[name]):
            raise ValueError(f"{where}: {name} = {_short(record[name])} is not {words}; {_CURE}")
    if not isinstance(record.get("text", ""), str):
        raise ValueError(f"{where}: text = {_short(record['text'])} is not text; {_CURE}")
    known = {field[0] for field in _fields(kind)} | {"text"}
    for name in record.keys() - known:
        del record[name]
    for names in SAME_LENGTH.get(kind, ()):
        lengths = {len(record[name]) for name in names if record[name] is not None}
        if len(lengths) > 1 or 0 in lengths:
            raise ValueError(f"{where}: {', '.join(names)} are not of one length; {_CURE}")
    return record


_CURE = "the file was damaged or edited. Remove the line, or put back a copy of the file"


def is_shallow(value: Any) -> bool:
    """Tell whether a value is nested less than MOST_DEPTH deep."""
    layer = [value]
    for _ in range(MOST_DEPTH):
        layer = [
            item
            for one in layer
            if isinstance(one, dict | list)
            for item in (one.values() if isinstance(one, dict) else one)
        ]
        if not layer:
            return True
    return False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


@functools.cache
def _fields(kind: Kind) -> tuple[tuple[str, Test, str, Any], ...]:
    """(name, test, what passes it in words, default) of each field."""
    hints = typing.get_type_hints(kind)
    found = []
    for field in dataclasses.fields(kind):
        test, words = _test(hints[field.name], field.name in ALWAYS_FINITE)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()  # {}, which no reader changes
        if isinstance(default, float):
            default = None  # what was not measured is not 0
        found.append((field.name, test, words, default))
    return tuple(found)


def _test(hint: Any, finite: bool) -> tuple[Test, str]:
    """Return a test for a type, and the type in words."""
    if hint is float and finite:
        return is_finite, "a finite number"
    if hint in _SIMPLE:
        return _SIMPLE[hint]
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        tests = [_test(one, finite) for one in inside]
        words = " or ".join(words for _, words in tests)
        return lambda value: any(test(value) for test, _ in tests), words
    test, words = _test(inside[0 if origin is tuple else 1], finite)
    if origin is tuple:
        return lambda value: isinstance(value, list) and all(map(test, value)), f"a list of {words}"
    assert origin is dict, hint
    return lambda value: isinstance(value, dict) and all(map(test, value.values())), "fields"


def _is_number(value: Any) -> bool:
    if type(value) is int or type(value) is float:
        return abs(value) <= LARGEST  # not so for NaN
    return isinstance(value, str) and value in NOT_FINITE


def is_finite(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return _is_number(value) and math.isfinite(float(value))


_SIMPLE: dict[Any, tuple[Test, str]] = {
    int: (lambda value: type(value) is int and 0 <= value <= MOST_COUNT, "a count"),
    float: (_is_number, "a number"),
    str: (lambda value: isinstance(value, str), "text"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
    type(None): (lambda value: value is None, "null"),
    Any: (lambda value: is_shallow(value), f"a value nested less than {MOST_DEPTH} deep"),
}
