"""Every command with --json has a schema in docs/schemas; other tests hold real output to them."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
from schemas import FOLDER, broken, schema_of

from glassloop.cli.__main__ import command_names

ROOT = Path(__file__).resolve().parents[3]
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["schema", "found"],
    "properties": {
        "schema": {"const": 1},
        "found": {"type": "array", "items": {"type": ["number", "null"]}},
        "by_name": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}


def test_every_command_with_json_has_a_schema_that_the_page_names() -> None:
    page = (ROOT / "docs/json.md").read_text(encoding="utf-8")
    for name in command_names():
        source = inspect.getsource(importlib.import_module(f"glassloop.cli.{name}"))
        if '"--json"' in source:
            assert name in NAMES, name
    assert sorted(re.findall(r"\(schemas/([\w-]+)\.json\)", page)) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_schema_is_versioned_and_uses_what_its_reader_understands(name: str) -> None:
    schema = schema_of(name)
    assert isinstance(schema["properties"]["schema"]["const"], int)
    assert "schema" in schema["required"]
    assert broken({}, schema, name) == f"{name}.schema is missing"
    assert json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")) == schema


def test_an_output_that_fits_passes() -> None:
    value = {"schema": 1, "found": [1, 2.5, None], "by_name": {"a": "b"}}
    assert broken(value, SCHEMA, "x") is None


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"schema": 2}, "x.schema is 2, not 1"),
        ({"found": [1, "2"]}, "x.found[1] is '2', not number or null"),
        ({"found": [True]}, "x.found[0] is True, not number or null"),
        ({"found": [float("nan")]}, "x.found[0] is nan, not number or null"),
        ({"new": 1}, "x.new is not in the schema"),
        ({"by_name": {"a": 1}}, "x.by_name.a is 1, not string"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], complaint: str) -> None:
    assert broken({"schema": 1, "found": []} | change, SCHEMA, "x") == complaint
