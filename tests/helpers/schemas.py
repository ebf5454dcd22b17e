"""Check a command's --json against its schema in docs/schemas."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "schemas"
TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}
UNDERSTOOD = {
    *("$schema", "$id", "title", "description"),
    *("type", "properties", "required", "additionalProperties", "items", "const"),
}


@cache
def schema_of(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def conform(name: str, value: Any) -> Any:
    """Return the value.

    AssertionError names the place at which it breaks the schema.
    """
    complaint = broken(value, schema_of(name), name)
    assert complaint is None, complaint
    return value


def broken(value: Any, schema: dict[str, Any], where: str) -> str | None:
    """The first place at which `value` breaks `schema`, or None.

    Understands the part of JSON Schema that docs/schemas uses.
    """
    assert set(schema) <= UNDERSTOOD, f"{where}: {set(schema) - UNDERSTOOD} is not understood"
    if "const" in schema and value != schema["const"]:
        return f"{where} is {value!r}, not {schema['const']!r}"
    if "type" in schema:
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not any(_is(value, kind) for kind in kinds):
            return f"{where} is {value!r:.60}, not {' or '.join(kinds)}"
    if isinstance(value, dict):
        known = schema.get("properties", {})
        for name in schema.get("required", ()):
            if name not in value:
                return f"{where}.{name} is missing"
        for name, one in value.items():
            rule = known.get(name, schema.get("additionalProperties", None if known else {}))
            if rule is None:  # readers may ignore it; the schema has to name it
                return f"{where}.{name} is not in the schema"
            if (found := broken(one, rule, f"{where}.{name}")) is not None:
                return found
    if isinstance(value, list):
        for number, one in enumerate(value):
            if (found := broken(one, schema.get("items", {}), f"{where}[{number}]")) is not None:
                return found
    return None


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, TYPES[kind])
