"""Formats of a source: which column is read as what.

| format | columns it reads |
| --- | --- |
| scam | dialogue, type, label; reasoning and response if present |
| reasoning | Question, Complex_CoT, Response |
| messages | messages: a list of {role, content}, or of {from, value} |
| sharegpt | conversations: the same |
| prompt_completion | prompt, completion |
| alpaca | instruction, output |
| question_answer | a question and an answer by their usual names (names.py) |
| chosen | chosen, and the question: the preferred answer of a preference file |
| text | text: trained whole, no question |

Formats with a question also read input, reasoning, system and history; those with messages read
system and tools; by their usual names, if the source has them. `data.columns` renames any column.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from glassloop.config import DataConfig
from glassloop.data.names import candidates, listed, plain, shown

# Format -> role -> the format's own name of a column that it needs.
NEEDED: dict[str, dict[str, str]] = {
    "messages": {"messages": "messages"},
    "sharegpt": {"messages": "conversations"},
    "scam": {"dialogue": "dialogue", "label": "label"},
    "reasoning": {"question": "Question", "reasoning": "Complex_CoT", "response": "Response"},
    "alpaca": {"question": "instruction", "response": "output"},
    "prompt_completion": {"question": "prompt", "response": "completion"},
    "question_answer": {"question": "question", "response": "answer"},
    "chosen": {"chosen": "chosen"},
    "text": {"text": "text"},
}
TOLD_BY_NAME = tuple(NEEDED)[:6]  # formats whose own names are looked for first
AROUND_A_QUESTION = ("input", "reasoning", "system", "history")
OPTIONAL: dict[str, tuple[str, ...]] = {
    "messages": ("system", "tools"),
    "sharegpt": ("system", "tools"),
    "scam": ("type", "reasoning", "response"),
    "reasoning": AROUND_A_QUESTION,
    "alpaca": AROUND_A_QUESTION,
    "prompt_completion": AROUND_A_QUESTION,
    "question_answer": AROUND_A_QUESTION,
    "chosen": ("question", "system"),
    "text": (),
}
COUNTERS = ("", "id", "idx", "index", "nr", "no", "number", "row")  # names that hold no text
SCAM_ONLY = ("type", "response")  # read under their own names alone, in format scam


@dataclass(frozen=True)
class Reading:
    """How a source is read.

    Attributes:
        kind: The format, never "auto".
        columns: What is read -> the column that holds it.
        unread: Columns that are not read.
    """

    kind: str
    columns: Mapping[str, str]
    unread: tuple[str, ...]


def reading_of(columns: Sequence[str], data: DataConfig, where: str) -> Reading:
    """Decide how a source with `columns` is read.

    Raises ValueError, with the source's columns and the settings to type, for a format or column
    that is not there or cannot be told.
    """
    mapped = {role: name for role, name in data.columns if name is not None}
    for role, name in mapped.items():
        if name not in columns:
            near = _nearest(name, columns)
            raise ValueError(
                f"data.columns.{role} = {name!r}: {where} has no such column; it has "
                f"{listed(columns)}{near}"
            )
    kind = data.format if data.format != "auto" else _told(columns, mapped, data, where)
    known = {*NEEDED[kind], *OPTIONAL[kind]}
    for role, name in mapped.items():
        if role not in known:
            raise ValueError(
                f"data.columns.{role} = {name!r}: format {kind} reads no such column, only "
                f"{', '.join([*NEEDED[kind], *OPTIONAL[kind]])}"
            )
    found = dict(mapped)
    for role, own in NEEDED[kind].items():
        if role not in found:
            found[role] = _needed(role, own, kind, columns, found, data, where)
    cues = kind == "scam" and data.scam_reasoning == "cues" and "reasoning" not in columns
    if cues and "type" not in found:
        found["type"] = _needed("type", "type", kind, columns, found, data, where)
    for role in OPTIONAL[kind]:
        if role not in found and (column := _optional(role, kind, columns, found, data, where)):
            found[role] = column
    unread = tuple(column for column in columns if column not in found.values())
    return Reading(kind, found, unread)


def _told(columns: Sequence[str], mapped: Mapping[str, str], data: DataConfig, where: str) -> str:
    """The first format whose columns are all there."""
    if {"question", "response"} <= mapped.keys():
        return "question_answer"
    for kind in ("chosen", "text", "messages", "scam"):
        if mapped.keys() & NEEDED[kind].keys() - {"label"}:
            return kind
    if not mapped and candidates("chosen", columns) and candidates("rejected", columns):
        raise ValueError(
            f"data.format = auto: {where} is a preference file: it has a chosen and a rejected "
            "answer for each question, and a run trains on one answer. Set data.format=chosen to "
            "train on the chosen answers; the rejected ones are then not read"
        )
    for kind in TOLD_BY_NAME:
        if not mapped and set(NEEDED[kind].values()) <= set(columns):
            return kind
    if not mapped and candidates("messages", columns):
        return "messages"
    if (mapped.get("question") or _asks(columns)) and (
        mapped.get("response") or candidates("response", columns)
    ):
        return "question_answer"
    if not mapped and candidates("text", columns):
        return "text"
    raise ValueError(
        f"data.format = auto: {where} has columns {listed(columns)}; none of them is known to hold "
        f"{'the answer' if mapped.get('question') or _asks(columns) else 'the question'}. "
        f"Say which does: {_line(columns, mapped, data)} (data.columns.messages=NAME for a list of "
        "turns, data.columns.text=NAME for texts to train on whole)"
    )


def _asks(columns: Sequence[str]) -> list[str]:
    """Columns that may hold the question; an input, if nothing else may."""
    return candidates("question", columns) or candidates("input", columns)


def _needed(
    role: str,
    own: str,
    kind: str,
    columns: Sequence[str],
    found: Mapping[str, str],
    data: DataConfig,
    where: str,
) -> str:
    """The column of a role that the format needs."""
    if own in columns and kind != "question_answer":
        return own
    usual = _asks(columns) if role == "question" else candidates(role, columns)
    usual = [column for column in usual if column not in found.values()]
    if kind in ("question_answer", "chosen", "text", "messages") and len(usual) == 1:
        return usual[0]
    if len(usual) > 1:
        raise ValueError(
            f"{where} has several columns that may hold the {role}: {listed(usual)}. "
            f"Choose one: {_line(columns, found, data)}"
        )
    raise ValueError(
        f"{where} has no column {own!r}, which format {kind} reads as {role}; it has "
        f"{listed(columns)}{_nearest(own, columns)} (set data.columns.{role}=NAME or another "
        "data.format)"
    )


def _optional(
    role: str,
    kind: str,
    columns: Sequence[str],
    found: Mapping[str, str],
    data: DataConfig,
    where: str,
) -> str | None:
    """The column of an optional role; raises ValueError for several."""
    if role in columns and role not in found.values():
        return role
    if kind == "scam" and role in SCAM_ONLY:
        return None
    usual = [column for column in candidates(role, columns) if column not in found.values()]
    if len(usual) > 1:
        raise ValueError(
            f"{where} has several columns that may hold the {role}: {listed(usual)}. "
            f"Choose one: data.columns.{role}={shlex.quote(shown(usual[0]))}"
        )
    return usual[0] if usual else None


def _line(columns: Sequence[str], mapped: Mapping[str, str], data: DataConfig) -> str:
    """The settings to type.

    Columns are filled in where names or their number leave no doubt; NAME stands for others.
    """
    question = mapped.get("question") or next(iter(_asks(columns)), None)
    response = mapped.get("response") or next(iter(candidates("response", columns)), None)
    if len(columns) < 2:
        filled = {"text": columns[0] if columns else "NAME"}
    else:
        left = [c for c in columns if c not in (question, response) and plain(c) not in COUNTERS]
        if len(left) == (not question) + (not response):  # enough, and none to choose from
            question = question or left.pop(0)
            response = response or left.pop(0)
        filled = {"question": question or "NAME", "response": response or "NAME"}
    words = [f"data.source={data.source}"]
    words += [f"data.columns.{role}={shown(column)}" for role, column in filled.items()]
    return shlex.join(words)


def _nearest(name: str, columns: Sequence[str]) -> str:
    lower = {column.lower(): column for column in columns}
    near = difflib.get_close_matches(name.lower(), lower, n=1)
    return f"; did you mean {lower[near[0]]!r}?" if near else ""
