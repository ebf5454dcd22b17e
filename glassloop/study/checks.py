"""Check a study's fields. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST = 1_000_000  # of cells beside each other, or seconds
MEASURES = ("loss", "stability", "memory", "time")


class StudyError(ValueError):
    """A study that cannot be run.

    The message names file, field, value and cure.
    """


@dataclass(frozen=True)
class Complaint:
    """Makes errors about one file."""

    file: str

    def __call__(self, field: str, value: Any, cure: str) -> StudyError:
        shown = repr(value) if len(repr(value)) <= 200 else f"{value!r:.200}..."
        return StudyError(f"{self.file}: {field} = {shown}: {cure}")


def word(value: Any) -> str:
    """A YAML value as the command line takes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return ",".join(map(word, value)) if isinstance(value, list) else str(value)


def near(name: str, names: Sequence[str]) -> str:
    same_end = [one for one in names if one.rpartition(".")[2] == name.rpartition(".")[2]]
    near = same_end or difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names[:40])}"


def text(values: Mapping[str, Any], key: str, bad: Complaint) -> str:
    if not isinstance(values.get(key, ""), str):
        raise bad(key, values[key], "a sentence; put it in quotes where it holds a colon")
    return " ".join(values.get(key, "").split())


def listed(values: Mapping[str, Any], key: str, bad: Complaint) -> list[Any]:
    if not isinstance(values.get(key, []), list):
        raise bad(key, values[key], "a list, one item a line that begins with -")
    return values.get(key, [])


def seeds(value: Any, bad: Complaint) -> tuple[int, ...]:
    sound = (
        isinstance(value, list)
        and value
        and all(
            isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 2**32 for one in value
        )
    )
    if not sound or len(set(value)) < len(value):
        raise bad(
            "seeds",
            value,
            "a list of different whole numbers, such as [1, 2, 3]; a verdict needs two or more",
        )
    return tuple(value)


def measures(value: Any, bad: Complaint) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(one in MEASURES for one in value):
        raise bad("measure", value, f"a list of {', '.join(MEASURES)}")
    return tuple(one for one in MEASURES if one in value)


def whole(values: Mapping[str, Any], key: str, default: int, bad: Complaint) -> int:
    value = values.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST:
        raise bad(key, value, f"a whole number from 1 to {MOST:,} (default {default})")
    return value


def flag(values: Mapping[str, Any], key: str, bad: Complaint) -> bool:
    if not isinstance(values.get(key, False), bool):
        raise bad(key, values[key], "true or false")
    return values.get(key, False)


def number(values: Mapping[str, Any], key: str, place: str, bad: Complaint) -> float:
    value = values.get(key, 0.0)
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e60:
        raise bad(f"{place}.{key}", value, "a number (YAML reads 5e-4 as text: write 5.0e-4)")
    return float(value)


def one_of(
    values: Mapping[str, Any],
    key: str,
    names: Sequence[str],
    default: str | None,
    bad: Complaint,
    place: str = "",
) -> str | None:
    value = values.get(key, default)
    if value is not None and value not in names:
        raise bad(f"{place}.{key}" if place else key, value, f"one of {', '.join(names)}")
    return value
