"""Explain a field of config or record: meaning, unit, source."""

from __future__ import annotations

import difflib
import json
import textwrap
from dataclasses import asdict
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from glassloop.config import Config
from glassloop.config.names import PEER_NAMES, field_names, is_section
from glassloop.config.options import Options
from glassloop.record.jsonl import KINDS
from glassloop.record.meaning import meanings, table, unit_of

SCHEMA = 1  # of --json
STATE = "checkpoints/update_NNNNNN/state.json"
INTRODUCTION = """# Every recorded field

This page is generated from the dataclasses: `glassloop explain --markdown > docs/record.md`. A test
holds it to them. `glassloop explain NAME` prints one field.

Files of JSON lines have one record a line; "inf", "-inf" and "nan" stand for numbers that are not
finite. A value that does not exist is null, never 0. Every file carries a schema version, and older
ones open. Lists by rank are in rank order. A number without a note on ranks is equal on all of
them. `attempt` grows each time that a resumed run does an update again: of several records of an
update the last one counts."""


def main(argv: list[str]) -> int:
    """Run the command.

    Returns 0, or 2 for a name that is no field.
    """
    own = Options(
        prog="glassloop explain",
        description="Explain a field of the config (optimizer.lr) or of a record "
        "(grad_norm_pre_clip), or all fields of a section (tracking) or of a file "
        "(machine.jsonl). Names of other trainers are understood.",
    )
    own.add_argument("field", nargs="?", help="its name, or that of a section or a file")
    own.add_argument("--json", action="store_true", help="print one JSON object")
    own.add_argument("--markdown", action="store_true", help="print docs/record.md")
    given = own.parse_args(argv)
    if given.markdown:
        print(markdown())
        return 0
    if given.field is None:
        raise ValueError("name a field, such as glassloop explain optimizer.lr")
    found = explained(given.field)
    if not found:
        raise ValueError(_unknown(given.field))
    if given.json:
        print(json.dumps({"schema": SCHEMA, "fields": found}, indent=1, ensure_ascii=False))
    else:
        print("\n\n".join("\n".join(_lines(one)) for one in found))
    return 0


def explained(name: str) -> list[dict[str, Any]]:
    """Every field of that name: of the config first, then of records.

    The name of a section or a file gives all of its fields.
    """
    peer = PEER_NAMES.get(name, name).partition("=")[0]
    found = [
        _of_config(field)
        for field in field_names()
        if peer in (field, field.rpartition(".")[2]) or field.startswith(f"{name}.")
    ]
    for file, kind in kinds().items():
        found += [
            {"name": one.name, "where": file, **_without(asdict(one), "name")}
            for one in meanings(kind)
            if name in (one.name, file)
        ]
    return found


def kinds() -> dict[str, type]:
    """The dataclass of each file."""
    from glassloop.saved.run_state import RunState

    return {**KINDS, STATE: RunState}


def markdown() -> str:
    """The page of all records."""
    parts = [INTRODUCTION]
    for file, kind in kinds().items():
        said = (kind.__doc__ or "").strip()
        said = textwrap.dedent(f"    {said}").strip()
        rows = [
            {
                "field": f"`{one.name}`",
                "type": one.type,
                "unit": one.unit,
                "ranks": one.layout,
                "meaning": one.text,
                "null": one.none_when,
            }
            for one in meanings(kind)
        ]
        parts += [f"## {file}\n\n{said}\n\n" + "\n".join(table(rows))]
    return "\n\n".join(parts)


def _of_config(name: str) -> dict[str, Any]:
    """A config field's meaning, type and default, as --help has them."""
    model: Any = Config
    *sections, last = name.split(".")
    for section in sections:
        model = model.model_fields[section].annotation
        assert is_section(model)
    info = model.model_fields[last]
    kind = _type_text(info.annotation)
    default = info.get_default(call_default_factory=True)
    return {
        "name": name,
        "where": "config.yaml, command line",
        "type": kind,
        "unit": unit_of(last) if {"int", "float"} & set(kind.split(" | ")) else "",
        "default": list(default) if isinstance(default, tuple) else default,
        "text": " ".join((info.description or "").split()),
        "other_names": sorted(
            peer for peer, ours in PEER_NAMES.items() if ours.partition("=")[0] == name
        ),
    }


def _type_text(annotation: Any) -> str:
    """A field's type in plain words: 'auto' | int."""
    inner = [one for one in get_args(annotation) if one is not Ellipsis]
    origin = get_origin(annotation)
    if annotation is type(None):
        return "null"
    if origin is Annotated:
        return _type_text(inner[0])
    if origin is Literal:
        return " | ".join(map(repr, inner))
    if origin in (Union, UnionType):
        return " | ".join(map(_type_text, inner))
    if origin is tuple:
        return f"list of {_type_text(inner[0])}"
    return str(getattr(annotation, "__name__", annotation))


def _lines(one: dict[str, Any]) -> list[str]:
    text = one["text"]
    labels = {
        "type": one["type"],
        "default": json.dumps(one["default"]) if "default" in one else "",
        "unit": one.get("unit", ""),
        "ranks": one.get("layout", ""),
        "null": one.get("none_when", ""),
        "elsewhere": ", ".join(one.get("other_names", ())),
    }
    said = [f"{one['name']}  ({one['where']})", *textwrap.wrap(text, 78, initial_indent="  ",
            subsequent_indent="  ")]  # fmt: skip
    return said + [f"  {label:<10}{value}" for label, value in labels.items() if value]


def _without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


def _unknown(name: str) -> str:
    known: dict[str, None] = dict.fromkeys(field_names())
    known |= dict.fromkeys(one.name for kind in kinds().values() for one in meanings(kind))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    near += [field for field in known if name.lower() in field and field not in near][:3]
    hint = f": did you mean {', '.join(near)}?" if near else ""
    return f"{name} is no field of the config and of no record{hint}"
