"""Layers of settings, put over each other: preset, hardware, file, command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from pydantic import BaseModel

from glassloop.config.config import Config
from glassloop.config.data import items_of
from glassloop.config.names import ConfigError

MAPPINGS = ("data.template_args", "lora.rank_pattern", "lora.alpha_pattern")
EITHER = {  # section -> two fields that say one thing
    "batch": ("accumulation", "rows_per_update"),
    "schedule": ("updates", "epochs"),
}


def check_said_once(given: dict[str, str]) -> None:
    """Raise ConfigError if the command line gives both updates and epochs."""
    updates, epochs = (given.get(f"schedule.{name}") for name in EITHER["schedule"])
    if updates not in (None, "null") and epochs is not None:
        raise ConfigError(
            f"schedule.updates = {updates} and schedule.epochs = {epochs} both say how long the "
            "run is: keep one"
        )


def with_mappings(argv: Sequence[str]) -> list[str]:
    """Put words FIELD.NAME=VALUE together, as the one field that they are.

    FIELD is one of MAPPINGS.
    """
    kept, found = list[str](), dict[str, list[str]]()
    for word in argv:
        plain = word.removeprefix("--")
        field = next((one for one in MAPPINGS if plain.startswith(f"{one}.") and "=" in plain), "")
        if field:
            found.setdefault(field, []).append(plain.removeprefix(f"{field}."))
        else:
            kept.append(word)
    return [*kept, *(f"{field}={','.join(words)}" for field, words in found.items())]


def nested(given: dict[str, str]) -> dict[str, Any]:
    """Nest {"batch.size": "2"} as {"batch": {"size": "2"}}.

    null is None, commas make a list.
    """
    values: dict[str, Any] = {}
    for dotted, text in given.items():
        *sections, last = dotted.split(".")
        model: type[BaseModel] = Config
        place = values
        for section in sections:
            model = cast(type[BaseModel], model.model_fields[section].annotation)
            place = place.setdefault(section, {})
        is_list = str(model.model_fields[last].annotation).startswith("tuple")
        place[last] = items_of(text) if is_list else None if text == "null" else text
    return values


def merge(below: dict[str, Any], above: dict[str, Any]) -> None:
    """Put a higher layer's values over a lower one's, in place.

    Of two fields that say one thing, the one that the higher layer gives replaces both below. A
    warmup that outlasts the higher layer's updates falls back to its share.
    """
    for section, pair in EITHER.items():
        if any((above.get(section) or {}).get(name) is not None for name in pair):
            for name in pair:
                (below.get(section) or {}).pop(name, None)
    upper, lower = above.get("schedule") or {}, below.get("schedule") or {}
    updates, warmup = str(upper.get("updates")), str(lower.get("warmup_updates"))
    both = updates.isdigit() and warmup.isdigit()
    if both and "warmup_updates" not in upper and int(warmup) > int(updates):
        del lower["warmup_updates"]
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            merge(below[key], value)
        else:
            below[key] = value
