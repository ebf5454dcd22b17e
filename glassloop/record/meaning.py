"""The meaning of every recorded field, read from the dataclasses' own docstrings.

A field's docstring is the text below it. Its unit follows from its name, its layout from its type.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
from dataclasses import dataclass
from typing import Any

from glassloop.record.checked import OF_MATRICES, OF_MODULES

UNITS = {  # end of a name: unit; the first that fits counts
    "loss_sum_nats": "nats",
    "_nats": "nats a token",
    "mb_s": "1e6 bytes/s",
    "_s": "s",
    "seconds": "s",
    "_gib": "GiB",
    "_mib": "MiB",
    "_mhz": "MHz",
    "_w": "W",
    "_c": "°C",
    "tokens": "tokens",
    "_share": "share, 0 to 1",
    "_busy": "share, 0 to 1",
}
TYPES = {"int": "whole number", "float": "number", "str": "text", "bool": "true or false"}
RANK_0 = "Rank 0: "


@dataclass(frozen=True)
class Meaning:
    """One field of one kind of record."""

    name: str
    type: str  # in words: "number", "whole numbers"
    unit: str  # empty for a name, a count or a ratio
    layout: str  # "one a rank", "one a matrix", "rank 0", "all ranks"; empty: equal on all
    text: str  # what it is
    none_when: str  # when it is None; empty if never


@functools.cache
def meanings(kind: type) -> tuple[Meaning, ...]:
    """Every field of a dataclass whose fields have docstrings.

    Raises ValueError for a field without one.
    """
    said = field_docstrings(kind)
    found = []
    for field in dataclasses.fields(kind):
        if field.name not in said:
            raise ValueError(f"{kind.__name__}.{field.name} has no docstring below it")
        text, none_when = _split(said[field.name])
        kind_text = str(field.type)
        found.append(
            Meaning(
                name=field.name,
                type=_type_in_words(kind_text),
                unit=unit_of(field.name),
                layout=_layout(field.name, kind_text, text),
                text=_begun(text.removeprefix(RANK_0)) if text.startswith(RANK_0) else text,
                none_when=none_when,
            )
        )
    return tuple(found)


def field_docstrings(kind: type) -> dict[str, str]:
    """The text below each field of a dataclass, on one line."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(node, ast.ClassDef), kind
    found, name = {}, None
    for child in node.body:
        if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            name = child.target.id
        elif name is not None and isinstance(child, ast.Expr) and _is_text(child.value):
            found[name] = " ".join(ast.literal_eval(child.value).split())
            name = None
        else:
            name = None
    return found


def unit_of(name: str) -> str:
    """The unit that a field's name says; empty if it says none."""
    return next((unit for end, unit in UNITS.items() if name.endswith(end)), "")


def _begun(text: str) -> str:
    return text[:1].upper() + text[1:]


def _is_text(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _split(text: str) -> tuple[str, str]:
    """A docstring without its sentence on None, and that sentence."""
    sentences = re.split(r"(?<=[.;])\s+(?=None )", text)
    when = next((one for one in sentences[1:]), "")
    return sentences[0], when.removeprefix("None ").rstrip(".")


def _type_in_words(kind: str) -> str:
    if kind.startswith("dict"):
        return "fields by name"
    if (inside := re.match(r"tuple\[(\w+)", kind)) is not None:
        return {"int": "whole numbers", "float": "numbers", "str": "texts"}[inside[1]]
    return TYPES[kind.partition(" ")[0]]


def _layout(name: str, kind: str, text: str) -> str:
    """The unit of a list's entries, or the ranks of a number."""
    if kind.startswith("tuple") and name.startswith("rank_"):
        return "one a rank"
    if name in OF_MATRICES:
        return "one a matrix"
    if name in OF_MODULES:
        return "one a module"
    if text.startswith(RANK_0):
        return "rank 0"
    return "all ranks" if "all ranks" in text else ""


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table of equal dicts; their keys are its heads."""
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads)]
    lines += [[str(row[head]).replace("|", "\\|") for head in heads] for row in rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]
