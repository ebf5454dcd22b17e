"""From the cells of one row to the turns of a conversation.

Every assistant turn is kept and carries loss, unless the row marks it (`weight: 0`,
`train: false`) or `data.labels=last` asks for the last one only. Turns behind the last one that
carries loss are left out.

Think tags. An answer that opens with a <think> ... </think> block is split into reasoning and
content. One with </think> alone answers a prompt that opened the block: it is split there. One
that opens a block and never closes it was cut off: it is a fault.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from glassloop.config import DataConfig
from glassloop.data import scam
from glassloop.data.cells import calls_of, is_blank, parsed, text_of, tools_of
from glassloop.data.names import (
    REASONING_KEYS,
    ROLE_KEYS,
    ROLES,
    TEXT_KEYS,
    TOOL_KEYS,
    TRAIN_KEYS,
    listed,
    shorten,
)
from glassloop.data.rows import RowFault, Skip, Turn

THINK_BLOCK = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
TURNS = re.compile(r"(?:u(?:c+t+)*a)*u(?:c+t+)*[ac]")  # user, call, tool, answer
KEYS = frozenset((*ROLE_KEYS, *TEXT_KEYS, *REASONING_KEYS, *TRAIN_KEYS, *TOOL_KEYS))


@dataclass
class Talk:
    """What one row says.

    Attributes:
        notes: What was read otherwise than written, to be counted over rows.
        unread: Keys of its messages that are not read.
    """

    turns: tuple[Turn, ...] = ()
    label: str | None = None
    tools: str | None = None
    notes: Counter[str] = field(default_factory=Counter)
    unread: set[str] = field(default_factory=set)


def talk_of(cells: Mapping[str, Any], kind: str, data: DataConfig, where: str) -> Talk:
    """Turns, class and tools of one row.

    `cells`: what the format reads -> the cell.

    Raises Skip for a row that teaches nothing, RowFault (naming `where`) for a broken one.
    """
    talk = Talk()
    system = cells.get("system")
    if kind == "text":
        text = text_of(cells["text"], "text", where, empty="empty text")
        talk.turns = (Turn("text", text),)
        return talk
    if kind == "scam":
        talk.label = scam.label_of(cells["label"], where)
        asked, answer, reasoning = scam.call(
            cells,
            talk.label,
            data.scam_reasoning,
            where,
            lambda cell, name: text_of(
                cell, name, where, "empty response" if name == "response" else None
            ),
        )
        turns = [Turn("user", asked), _answer(answer, reasoning, where, talk)]
    elif kind in ("messages", "sharegpt"):
        turns = _conversation(cells["messages"], where, talk)
        talk.tools = tools_of(cells.get("tools"), where)
    else:
        turns = _question_answer(cells, "chosen" if kind == "chosen" else "response", where, talk)
    talk.turns = tuple(
        _with_system(_carrying_loss(turns, data, where, talk), system, data, where, talk)
    )
    return talk


def _question_answer(cells: Mapping[str, Any], answer: str, where: str, talk: Talk) -> list[Turn]:
    asked, said = cells.get("question"), cells[answer]
    if isinstance(said, list) or isinstance(asked, list):  # turns, as TRL writes them
        before = asked if isinstance(asked, list) else []
        if isinstance(asked, str) and said and not _is_user(said[0]):
            before = [{"role": "user", "content": asked}]
        after = said if isinstance(said, list) else [{"role": "assistant", "content": said}]
        return _conversation([*before, *after], where, talk)
    if "question" not in cells:
        raise RowFault(
            "no question",
            f"{where}: {answer} = {shorten(said)} is text, and no column holds its question; set "
            "data.columns.question=NAME",
        )
    question = text_of(asked, "question", where)
    if not is_blank(cells.get("input")):
        question += "\n\n" + text_of(cells["input"], "input", where)
    reasoning = None
    if "reasoning" in cells:
        reasoning = text_of(cells["reasoning"], "reasoning", where, empty="empty reasoning")
    text = text_of(said, answer, where, empty="empty response")
    return [
        *_history(cells.get("history"), where, talk),
        Turn("user", question),
        _answer(text, reasoning, where, talk),
    ]


def _is_user(message: Any) -> bool:
    return isinstance(message, dict) and ROLES.get(str(_first(message, ROLE_KEYS))) == "user"


def _history(cell: Any, where: str, talk: Talk) -> list[Turn]:
    """Earlier turns: pairs of question and answer."""
    pairs = parsed(cell)
    if is_blank(pairs) or pairs == []:
        return []
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in pairs
    ):
        raise RowFault(
            "history without pairs",
            f"{where}: history = {shorten(cell)}; pairs of question and answer are needed",
        )
    turns: list[Turn] = []
    for place, (asked, said) in enumerate(pairs):
        here = f"{where}, history {place}"
        turns.append(Turn("user", text_of(asked, "question", here)))
        turns.append(_answer(text_of(said, "response", here), None, here, talk))
    return turns


def _conversation(cell: Any, where: str, talk: Talk) -> list[Turn]:
    messages = parsed(cell)
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise RowFault(
            "messages are no list",
            f"{where}: messages = {shorten(cell)}; a list of {{role, content}} is needed",
        )
    turns = [
        turn
        for place, message in enumerate(messages)
        if (turn := _turn(message, f"{where}, message {place}", talk)) is not None
    ]
    while turns and turns[-1].role != "assistant":
        turns.pop()
    if not turns:
        raise Skip("no assistant turn")
    first = turns[0].role == "system"
    letters = "".join(
        "c"
        if turn.role == "assistant" and turn.extra and "tool_calls" in turn.extra
        else turn.role[0]
        for turn in turns[first:]
    )
    if not TURNS.fullmatch(letters):
        raise Skip("user and assistant do not take turns")
    return turns


def _turn(message: Mapping[str, Any], here: str, talk: Talk) -> Turn | None:
    """One message; None for a blank system turn."""
    spoken = _first(message, ROLE_KEYS)
    role = ROLES.get(str(spoken))
    if role is None:
        raise RowFault(
            "unknown role",
            f"{here}: role = {shorten(spoken)}; known are {', '.join(ROLES)}",
        )
    talk.unread |= {key for key, value in message.items() if key not in KEYS and value is not None}
    if message.get("function_call"):
        raise RowFault(
            "function_call",
            f"{here}: function_call = {shorten(message['function_call'])}; write it as tool_calls",
        )
    text = _first(message, TEXT_KEYS)
    if role == "system" and is_blank(text):
        return None
    extra = {key: message[key] for key in TOOL_KEYS if message.get(key)}
    if role == "call":
        extra["tool_calls"], text, role = [parsed(text)], "", "assistant"
    if "tool_calls" in extra:
        extra["tool_calls"] = calls_of(extra["tool_calls"], here)
    if role in ("user", "system"):
        extra = {}
        talk.unread |= {key for key in TOOL_KEYS if message.get(key)}
    packed = json.dumps(extra, ensure_ascii=False) if extra else None
    if role != "assistant":
        return Turn(role, text_of(text, "content", here), extra=packed)
    reasoning = _reasoning(message, here)
    if "tool_calls" in extra and is_blank(text):
        return Turn("assistant", "", reasoning, _trained(message, here), extra=packed)
    text = text_of(text, "content", here, empty="empty response")
    turn = _answer(text, reasoning, here, talk)
    return replace(turn, trained=_trained(message, here), extra=packed)


def _reasoning(message: Mapping[str, Any], here: str) -> str | None:
    """Reasoning beside the content, whatever its key.

    Raises RowFault for two that differ.
    """
    found = {key: message[key] for key in REASONING_KEYS if not is_blank(message.get(key))}
    texts = {text_of(value, key, here) for key, value in found.items()}
    if len(texts) > 1:
        raise RowFault("two reasonings", f"{here}: {listed(list(found))} differ; keep one")
    return texts.pop() if texts else None


def _trained(message: Mapping[str, Any], here: str) -> bool:
    """False for a turn that the row excludes from the loss."""
    marks = {key: message[key] for key in TRAIN_KEYS if message.get(key) is not None}
    for key, value in marks.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RowFault(
                "weight that is not 0 or 1",
                f"{here}: {key} = {shorten(value)}; a turn has loss (1, true) or none (0, false)",
            )
    return all(marks.values())


def _answer(text: str, reasoning: str | None, where: str, talk: Talk) -> Turn:
    """An assistant turn, its think block split off."""
    inline = False
    if block := THINK_BLOCK.fullmatch(text):
        if reasoning is not None and block.group(1).strip() != reasoning.strip():
            raise RowFault(
                "two reasonings",
                f"{where}: it has reasoning beside the answer and another within; keep one",
            )
        reasoning, text = block.groups()
        inline = True
    elif reasoning is None and text.count("</think>") == 1 and "<think>" not in text:
        reasoning, text = text.split("</think>")
        reasoning, text = reasoning.strip("\n"), text.lstrip("\n")
        talk.notes["answers with </think> alone: the text before it is their reasoning"] += 1
    elif text.lstrip().startswith("<think>"):
        raise RowFault(
            "think block never closed",
            f"{where}: the answer opens <think> and never closes it: it was cut off",
        )
    if not text.strip():
        raise Skip("empty response")
    kept = reasoning if reasoning and reasoning.strip() else None
    return Turn("assistant", text, kept, inline=inline and kept is not None)


def _carrying_loss(turns: list[Turn], data: DataConfig, where: str, talk: Talk) -> list[Turn]:
    """Turns up to the last with loss; raises Skip without any."""
    excluded = sum(not turn.trained for turn in turns)
    if excluded and data.labels == "everything":
        raise RowFault(
            "weight 0 under data.labels=everything",
            f"{where}: a turn is marked to have no loss, but data.labels = everything would train "
            "it; set data.labels=response",
        )
    trained = [
        place for place, turn in enumerate(turns) if turn.role == "assistant" and turn.trained
    ]
    if not trained:
        raise Skip("no turn that carries loss")
    if excluded:
        talk.notes["assistant turns without loss, as their rows ask (weight 0, train false)"] += (
            excluded
        )
    if data.labels == "last":
        turns = [replace(turn, trained=place == trained[-1]) for place, turn in enumerate(turns)]
    return turns[: trained[-1] + 1]


def _with_system(
    turns: list[Turn], cell: Any, data: DataConfig, where: str, talk: Talk
) -> list[Turn]:
    """Turns with the row's system prompt, or data.system, as data.system_turn places it."""
    own = turns[0].content if turns[0].role == "system" else None
    column = None if is_blank(cell) else text_of(cell, "system", where)
    if own is not None and column is not None and own != column:
        raise RowFault("two system prompts", f"{where}: it has two system prompts; keep one")
    system = own or column or data.system
    spoken = turns[own is not None :]
    if system is None:
        return spoken
    if data.system_turn == "keep":
        return [Turn("system", system), *spoken]
    if data.system_turn == "drop":
        talk.notes["system turns left out (data.system_turn=drop)"] += 1
        return spoken
    talk.notes["system turns put before the first question (data.system_turn=user)"] += 1
    return [replace(spoken[0], content=f"{system}\n\n{spoken[0].content}"), *spoken[1:]]


def _first(message: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """The first of `keys` that the message has, null aside."""
    return next((message[key] for key in keys if message.get(key) is not None), None)
