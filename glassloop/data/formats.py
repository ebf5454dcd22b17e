"""From the columns of a source to conversations: which format it is, which column holds what, what each row becomes.

| format | columns it reads |
| --- | --- |
| scam | dialogue, type, label; reasoning and response where present |
| reasoning | Question, Complex_CoT, Response |
| messages | messages: a list of {role, content} |
| sharegpt | conversations: a list of {from, value} |
| prompt_completion | prompt, completion |
| alpaca | instruction, input (optional), output |

alpaca and prompt_completion read a column `reasoning` too where there is one.

A row of format scam asks SCAM_QUESTION about its dialogue and answers with a verdict line. Between the think tags stands its
own `reasoning` where it brings one; else, with `data.scam_reasoning=cues`, what is typical of its `type` of call (CUES), or of
its class where the type is unknown (OTHER_CUES). The question holds neither type nor label, so neither leaks into the prompt.

`data.columns` renames any of them. Every assistant turn is kept, so that every one is supervised. Assistant text that opens
with a <think> ... </think> block is split into reasoning and content.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from glassloop.config.config import DataConfig
from glassloop.data.rows import Turn

SCAM_QUESTION = (
    "Read this phone call and decide whether the caller is trying to cheat the receiver. Think it over first, and end your answer "
    "with the line 'Verdict: scam' or 'Verdict: not a scam'.\n\nThe call:\n"
)
VERDICTS = {"scam": "Verdict: scam", "honest": "Verdict: not a scam"}
LABELS = {
    "1": "scam",
    "1.0": "scam",
    "true": "scam",
    "scam": "scam",
    "0": "honest",
    "0.0": "honest",
    "false": "honest",
    "honest": "honest",
}

# What is typical of a kind of call, not of the call at hand. It follows from `type` and `label`, so it stands in the answer only.
CUES = {
    (
        "ssn",
        "scam",
    ): "The caller claims to speak for a government office and says that a social security number is suspended or "
    "misused. Real offices write letters. They do not ask for the number or for money on the phone, and they do not threaten.",
    (
        "refund",
        "scam",
    ): "The caller offers a refund that nobody asked for and wants bank details, a fee or a look at the computer "
    "before it is paid. Money that is truly owed comes back the way it was paid.",
    (
        "support",
        "scam",
    ): "The caller reports a fault that the receiver had not noticed and wants remote access, a password or a "
    "payment to repair it. Real support waits until somebody calls for help.",
    (
        "reward",
        "scam",
    ): "The caller announces a prize or a reward and wants a fee, bank details or personal data before handing it "
    "over. A real prize costs nothing.",
    (
        "delivery",
        "honest",
    ): "The caller arranges when and where something is handed over. No secret and no unusual payment is "
    "asked for, and what is said can be checked with the sender.",
    (
        "insurance",
        "honest",
    ): "The caller explains an insurance policy or a claim, names the company and answers questions. The receiver is "
    "free to think about it and to call back.",
    (
        "wrong",
        "honest",
    ): "The caller has reached somebody else than intended, notices it and ends the call. Nothing is wanted from the receiver.",
    (
        "appointment",
        "honest",
    ): "The caller makes, confirms or moves an appointment. Both sides know what it is about, and nothing "
    "beyond that is asked for.",
    (
        "telemarketing",
        "honest",
    ): "The caller openly sells something, says for whom, and accepts a no. That may be unwelcome, but nobody is deceived.",
}
OTHER_CUES = {
    "scam": "The caller wants money, access or personal data, gives a reason nobody can check, and presses for a quick answer.",
    "honest": "The caller has an ordinary reason to call, asks for nothing secret and leaves the receiver time to decide.",
}
CONCLUSIONS = {
    "scam": "This has the marks of a scam.",
    "honest": "This does not have the marks of a scam.",
}

COLUMNS: dict[
    str, dict[str, str]
] = {  # format -> what it reads -> the format's own name for the column
    "messages": {"messages": "messages"},
    "sharegpt": {"messages": "conversations"},
    "scam": {
        "dialogue": "dialogue",
        "type": "type",
        "label": "label",
        "reasoning": "reasoning",
        "response": "response",
    },
    "reasoning": {"question": "Question", "reasoning": "Complex_CoT", "response": "Response"},
    "alpaca": {
        "question": "instruction",
        "response": "output",
        "reasoning": "reasoning",
        "input": "input",
    },
    "prompt_completion": {"question": "prompt", "response": "completion", "reasoning": "reasoning"},
}
DETECTED_BY = {  # columns that tell a format, in the order in which formats are tried
    "messages": ("messages",),
    "sharegpt": ("messages",),
    "scam": ("dialogue", "label"),
    "reasoning": ("question", "response"),
    "alpaca": ("question", "response"),
    "prompt_completion": ("question", "response"),
}
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
THINK_BLOCK = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
VERDICT_LINE = re.compile(r"^\W*verdict\W*:(.*)$", re.IGNORECASE | re.MULTILINE)


class Skip(Exception):
    """A row that is left out and counted; the message is the reason."""


def verdict_of(text: str) -> str | None:
    """Class that an answer's last verdict line names: "scam", "honest", or None where no line names one clearly.

    Only what follows the last `</think>` is read where there is one. Case, quotes, asterisks and a full stop do not matter.
    """
    lines = VERDICT_LINE.findall(text.rpartition("</think>")[2])
    said = " ".join(re.findall(r"[a-z]+", lines[-1].lower())) if lines else ""
    if said in ("scam", "a scam"):
        return "scam"
    return "honest" if said in ("not a scam", "not scam", "no scam", "honest") else None


def detect_format(columns: Sequence[str], data: DataConfig, where: str) -> str:
    """`data.format`, or with `auto` the first format whose columns are all there under `data.columns` or their own names."""
    if data.format != "auto":
        return data.format
    mapped = {role for role, name in data.columns if name is not None}
    for kind, roles in DETECTED_BY.items():
        names = [getattr(data.columns, role) or COLUMNS[kind][role] for role in roles]
        if mapped <= set(COLUMNS[kind]) and all(name in columns for name in names):
            return kind
    unknown = [
        f"data.columns.{role} = {name!r}"
        for role, name in data.columns
        if name is not None and name not in columns
    ]
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: {where} has no such column; it has {', '.join(columns)}"
        )
    raise ValueError(
        f"data.format = auto: {where} has columns {', '.join(columns)}, which fit no format; say what holds what, for example "
        "data.columns.question=... data.columns.reasoning=... data.columns.response=..., or data.columns.messages=..."
    )


def column_names(kind: str, columns: Sequence[str], data: DataConfig, where: str) -> dict[str, str]:
    """What format `kind` reads -> name of a column that exists. Raises ValueError for one that is needed or mapped and
    missing."""
    mapped = {role: name for role, name in data.columns if name is not None}
    for role, name in mapped.items():
        if role not in COLUMNS[kind]:
            raise ValueError(
                f"data.columns.{role} = {name!r}: format {kind} reads no such column, only {', '.join(COLUMNS[kind])}"
            )
    needed = set(DETECTED_BY[kind]) | mapped.keys()
    if kind == "reasoning" and "question" not in mapped:
        needed.add("reasoning")
    if kind == "scam" and data.scam_reasoning == "cues" and "reasoning" not in columns:
        needed.add("type")
    names = {role: mapped.get(role, own) for role, own in COLUMNS[kind].items()}
    for role in sorted(needed):
        if names[role] not in columns:
            near = difflib.get_close_matches(
                names[role].lower(), [column.lower() for column in columns], n=1
            )
            hint = next(
                (
                    f"; did you mean {column!r}?"
                    for column in columns
                    if near and column.lower() == near[0]
                ),
                "",
            )
            raise ValueError(
                f"{where} has no column {names[role]!r}, which format {kind} reads as {role}; it has {', '.join(columns)}{hint} "
                f"(set data.columns.{role}=NAME or another data.format)"
            )
    return {role: name for role, name in names.items() if name in columns}


def to_turns(
    cells: Mapping[str, Any], kind: str, data: DataConfig, where: str
) -> tuple[tuple[Turn, ...], str | None]:
    """Turns and class (None but for scam) of one row. `cells`: what the format reads -> the cell, as `column_names` found it.

    Turns begin with `data.system` where it is set and the row brings no system turn of its own. Turns behind the last assistant
    turn carry no loss and are left out. Raises Skip for a row without a use, ValueError (naming `where`) for one that is
    broken.
    """
    label = None
    if kind in ("messages", "sharegpt"):
        turns = _conversation(
            cells["messages"],
            *(("role", "content") if kind == "messages" else ("from", "value")),
            where,
        )
    elif kind == "scam":
        label = _label(cells["label"], where)
        turns = _scam(cells, label, data, where)
    else:
        turns = _question_answer(cells, kind, where)
    if data.system is not None and turns[0].role != "system":
        turns = [Turn("system", data.system), *turns]
    return tuple(turns), label


def shorten(value: object, limit: int = 60) -> str:
    """`value` as Python writes it, cut to about `limit` characters: for messages."""
    text = repr(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit + 2 else text[:limit] + "..."


def _text(value: Any, name: str, where: str, *, empty: str) -> str:
    """`value` as it is. `empty`: "refuse" raises ValueError for a cell without text, anything else is the reason of a Skip."""
    if value is None or (isinstance(value, str) and not value.strip()):
        if empty != "refuse":
            raise Skip(empty)
        raise ValueError(f"{where}: {name} is empty; fill it or leave the row out")
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: {name} = {shorten(value)} is {type(value).__name__}, not text; put a text in the column or map another one"
        )
    if "\0" in value:
        raise ValueError(
            f"{where}: {name} = {shorten(value)} holds a NUL byte at character {value.index(chr(0))}; remove it from the source"
        )
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise ValueError(
            f"{where}: {name} = {shorten(value)} holds half of a surrogate pair, which is no character; write the source as UTF-8"
        )
    return value


def _assistant(text: str, reasoning: str | None = None) -> Turn:
    if reasoning is None and (block := THINK_BLOCK.fullmatch(text)):
        reasoning, text = block.groups()
    if not text.strip():
        raise Skip("empty response")
    return Turn("assistant", text, reasoning if reasoning and reasoning.strip() else None)


def _question_answer(cells: Mapping[str, Any], kind: str, where: str) -> list[Turn]:
    question = _text(cells["question"], "question", where, empty="refuse")
    if cells.get("input"):
        question += "\n\n" + _text(cells["input"], "input", where, empty="refuse")
    reasoning = (
        _text(cells["reasoning"], "reasoning", where, empty="empty reasoning")
        if "reasoning" in cells
        else None
    )
    return [
        Turn("user", question),
        _assistant(_text(cells["response"], "response", where, empty="empty response"), reasoning),
    ]


def _label(value: Any, where: str) -> str:
    label = LABELS.get(str(value).strip().lower())
    if label is None:
        raise ValueError(
            f"{where}: label = {shorten(value)}; a call is labelled 1 or scam, 0 or honest"
        )
    return label


def _scam(cells: Mapping[str, Any], label: str, data: DataConfig, where: str) -> list[Turn]:
    question = SCAM_QUESTION + _text(cells["dialogue"], "dialogue", where, empty="refuse").strip()
    reasoning = None if data.scam_reasoning == "drop" else cells.get("reasoning")
    if reasoning is not None and not (isinstance(reasoning, str) and not reasoning.strip()):
        reasoning = _text(reasoning, "reasoning", where, empty="refuse")
    else:
        reasoning = (
            _cues(cells.get("type"), label, where) if data.scam_reasoning == "cues" else None
        )
    response = VERDICTS[label]
    if "response" in cells:
        response = _text(cells["response"], "response", where, empty="empty response")
        said = verdict_of(response)
        if said != label:
            claim = "names no verdict" if said is None else f"says {said}"
            raise ValueError(
                f"{where}: the response {claim}, but label = {shorten(cells['label'])} says {label}; "
                f"correct one of them (a response ends with a line such as '{VERDICTS[label]}'), or drop the column"
            )
    return [Turn("user", question), _assistant(response, reasoning)]


def _cues(kind: Any, label: str, where: str) -> str:
    """Marks of the call's kind; those of any call of its class where the kind is unknown or is known for the other class."""
    known = _text(kind, "type", where, empty="refuse").strip().lower() if kind is not None else ""
    return CUES.get((known, label), OTHER_CUES[label]) + " " + CONCLUSIONS[label]


def _conversation(messages: Any, role_key: str, text_key: str, where: str) -> list[Turn]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(
            f"{where}: messages = {shorten(messages)}; a list of {{{role_key}, {text_key}}} is needed"
        )
    turns: list[Turn] = []
    for place, message in enumerate(messages):
        here = f"{where}, message {place}"
        role = ROLES.get(str(message.get(role_key)))
        if role is None:
            raise ValueError(
                f"{here}: {role_key} = {shorten(message.get(role_key))}; known are {', '.join(ROLES)}: leave other turns out"
            )
        if message.get("tool_calls"):
            raise ValueError(
                f"{here}: tool_calls = {shorten(message['tool_calls'])}; calls of tools cannot be trained on: leave the row out"
            )
        if role == "assistant":
            text = _text(message.get(text_key), text_key, here, empty="empty response")
            thought = message.get("reasoning_content")
            turns.append(
                _assistant(
                    text,
                    _text(thought, "reasoning_content", here, empty="refuse") if thought else None,
                )
            )
        else:
            turns.append(Turn(role, _text(message.get(text_key), text_key, here, empty="refuse")))
    while turns and turns[-1].role != "assistant":
        turns.pop()
    if not turns:
        raise Skip("no assistant turn")
    spoken = [turn.role for turn in turns[turns[0].role == "system" :]]
    if spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise Skip("user and assistant do not take turns")
    return turns
