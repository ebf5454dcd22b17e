"""Read the axes of a study's grid. No torch."""

from __future__ import annotations

from typing import Any

from glassloop.config.names import field_names
from glassloop.study.checks import (
    Complaint,
    near,
    word,
)
from glassloop.study.claims import Axes, Setting


def read_axes(values: Any, bad: Complaint) -> Axes:
    if not isinstance(values, dict) or not values:
        raise bad(
            "axes",
            values,
            "what is varied: a field of the config with a list of values, such as lora.r: [8, 16, "
            "32]",
        )
    known, found = field_names(), []
    for axis, given in values.items():
        place = f"axes.{axis}"
        if isinstance(given, list) and given:
            if axis not in known:
                raise bad(
                    place, given, f"{axis} is no field of the config; {near(str(axis), known)}"
                )
            settings = [Setting(word(value), ((axis, word(value)),)) for value in given]
        elif (
            isinstance(given, dict)
            and given
            and all(isinstance(fields, dict) for fields in given.values())
        ):
            for label, fields in given.items():
                if unknown := [field for field in fields if field not in known]:
                    raise bad(
                        f"{place}.{label}",
                        fields,
                        f"{unknown[0]} is no field of the config; {near(str(unknown[0]), known)}",
                    )
            settings = [
                Setting(word(label), tuple((f, word(v)) for f, v in fields.items()))
                for label, fields in given.items()
            ]
        else:
            raise bad(
                place,
                given,
                "a list of values of a field, or settings such as {r8: {lora.r: 8, lora.alpha: 8}}",
            )
        if len({setting.label for setting in settings}) < len(settings):
            raise bad(place, given, "a value stands there twice; leave one out")
        found.append((str(axis), tuple(settings)))
    return tuple(found)
