"""Cells of a row as text, tool calls and tools."""

from __future__ import annotations

import json
from typing import Any

from glassloop.data.arrow_files import JsonText
from glassloop.data.names import shorten
from glassloop.data.rows import RowFault, Skip


def calls_of(found: Any, here: str) -> list[dict[str, Any]]:
    """Tool calls as chat templates take them, with arguments as an object."""
    calls = parsed(found)
    result = []
    for call in calls if isinstance(calls, list) else [calls]:
        inner = call.get("function", call) if isinstance(call, dict) else None
        arguments = parsed(inner.get("arguments", {})) if isinstance(inner, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise RowFault(
                "tool call without a name",
                f"{here}: tool_calls = {shorten(found)}; each needs a function's name and "
                "arguments",
            )
        made: dict[str, Any] = {"name": inner["name"], "arguments": arguments}
        more = {"id": call["id"]} if call.get("id") else {}
        result.append({"type": "function", "function": made, **more})
    return result


def tools_of(cell: Any, where: str) -> str | None:
    """Tools of a row as a JSON list; None without any."""
    tools = parsed(cell)
    if is_blank(tools) or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowFault("tools are no list", f"{where}: tools = {shorten(cell)}; a list is needed")
    return json.dumps(tools, ensure_ascii=False)


def parsed(cell: Any) -> Any:
    """Parse a text that spells JSON; keep other cells."""
    if isinstance(cell, str) and cell.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell
    return cell


def is_blank(cell: Any) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip())


def text_of(value: Any, name: str, where: str, empty: str | None = None) -> str:
    """A cell as text.

    `empty`: the reason to skip a row whose cell is blank; None: a fault.
    """
    if is_blank(value):
        if empty is not None:
            raise Skip(empty)
        raise RowFault(f"empty {name}", f"{where}: {name} is empty; fill it or leave the row out")
    if isinstance(value, JsonText):
        raise RowFault(
            f"{name} is JSON",
            f"{where}: {name} = {shorten(str(value))} stands in a column of type JSON, so its "
            "quotes may be the writer's; save the column as text",
        )
    if not isinstance(value, str):
        raise RowFault(
            f"{name} is not text",
            f"{where}: {name} = {shorten(value)} is {type(value).__name__}, not text; put a text "
            "in the column or map another one",
        )
    if "\0" in value:
        raise RowFault(
            "NUL byte",
            f"{where}: {name} = {shorten(value)} holds a NUL byte at character "
            f"{value.index(chr(0))}; remove it from the source",
        )
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise RowFault(
            "half of a surrogate pair",
            f"{where}: {name} = {shorten(value)} holds half of a surrogate pair, which is no "
            "character; write the source as UTF-8",
        )
    return value
