"""Read a study's claims from its file. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glassloop.study.checks import Complaint, near, number, one_of, word
from glassloop.study.quantities import QUANTITIES

CLAIM_KEYS = ("says", "quantity", "cell", "against", "scale", "expect", "by", "value", "within")

Axes = tuple[tuple[str, tuple["Setting", ...]], ...]  # name and settings of each


@dataclass(frozen=True)
class Setting:
    """One value of an axis: config fields as words."""

    label: str
    fields: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Claim:
    """A claim on d = quantity(cell) - quantity(against), seed by seed.

    Attributes:
        cell, against: axis -> label; axes that both leave open are averaged over. against may be a
            number.
        scale: "absolute": d in the quantity's unit. "share": d over the value that it is set
            against.
        expect: "higher": d > by. "lower": d < -by. "about": |d - value| <= within.
    """

    says: str
    quantity: str
    cell: Mapping[str, str]
    against: Mapping[str, str] | float
    scale: str
    expect: str
    by: float
    value: float
    within: float


def read_claim(item: Any, place_in_list: int, axes: Axes, bad: Complaint) -> Claim:
    place = f"claims[{place_in_list}]"
    if not isinstance(item, dict):
        raise bad(place, item, f"fields {', '.join(CLAIM_KEYS)}")
    for key in item:
        if key not in CLAIM_KEYS:
            raise bad(
                f"{place}.{key}", item[key], f"no field of a claim; {near(str(key), CLAIM_KEYS)}"
            )
    if not isinstance(item.get("says"), str):
        raise bad(f"{place}.says", item.get("says"), "the claim in words")
    quantity = item.get("quantity")
    if not isinstance(quantity, str) or quantity not in QUANTITIES:
        raise bad(
            f"{place}.quantity", quantity, f"not measured; {near(str(quantity), tuple(QUANTITIES))}"
        )
    expect = one_of(item, "expect", ("higher", "lower", "about"), None, bad, place)
    if expect is None:
        raise bad(
            f"{place}.expect", None, "higher, lower or about: what the claim says of the difference"
        )
    if isinstance(item.get("against"), int | float) and not abs(item["against"]) < 1e60:
        raise bad(f"{place}.against", item["against"], "a finite number, or cells")
    cell = _selected(item.get("cell"), f"{place}.cell", axes, bad)
    against = item.get("against")
    if not (isinstance(against, int | float) and not isinstance(against, bool)):
        against = _selected(against, f"{place}.against", axes, bad)
        if set(against) != set(cell) or against == cell:
            raise bad(
                f"{place}.against",
                item.get("against"),
                f"name the axes that cell names ({', '.join(cell)}), with another setting",
            )
    numbers = {key: number(item, key, place, bad) for key in ("by", "value", "within")}
    if expect == "about" and ("value" not in item or numbers["within"] <= 0):
        raise bad(
            f"{place}.expect",
            "about",
            "needs value, the difference that is claimed, and within, how far from it still agrees "
            "(above 0)",
        )
    if numbers["by"] < 0:
        raise bad(
            f"{place}.by",
            item["by"],
            "the least difference worth the claim: 0 or more, whichever direction is expected",
        )
    scale = one_of(item, "scale", ("absolute", "share"), "absolute", bad, place)
    return Claim(item["says"], str(quantity), cell, against, str(scale), expect, **numbers)


def _selected(value: Any, place: str, axes: Axes, bad: Complaint) -> dict[str, str]:
    if not isinstance(value, dict) or not value:
        raise bad(
            place,
            value,
            f"which cells: an axis and its setting, of {', '.join(axis for axis, _ in axes)}",
        )
    labels = {axis: [setting.label for setting in settings] for axis, settings in axes}
    for axis, label in value.items():
        if word(label) not in labels.get(axis, ()):
            there = (
                f"there are {', '.join(labels[axis])}"
                if axis in labels
                else f"no such axis; there are {', '.join(labels)}"
            )
            raise bad(f"{place}.{axis}", label, there)
    return {axis: word(label) for axis, label in value.items()}
