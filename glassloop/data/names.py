"""Usual names of columns, turns and keys.

Names are compared in lower case, without a plural's s, with _ - and runs of spaces as one space.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# Role -> usual names of its column.
COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "chat", "turns"),
    "question": ("question", "prompt", "instruction", "query", "problem"),
    "input": ("input", "context"),
    "response": (
        "answer",
        "response",
        "output",
        "completion",
        "solution",
        "reply",
        "target",
    ),
    "reasoning": (
        "reasoning",
        "reasoning_content",
        "cot",
        "complex_cot",
        "chain_of_thought",
        "think",
        "thinking",
        "thought",
        "rationale",
    ),
    "system": ("system", "system_prompt", "system_message"),
    "history": ("history",),
    "tools": ("tools", "functions"),
    "text": ("text",),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
}

# What a turn calls its speaker -> role.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "call",
    "tool": "tool",
    "tool_response": "tool",
    "observation": "tool",
    "function": "tool",
}
ROLE_KEYS = ("role", "from")
TEXT_KEYS = ("content", "value")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought", "think", "cot")
TRAIN_KEYS = ("weight", "train", "training")  # 0 or false: the turn carries no loss
TOOL_KEYS = ("tool_calls", "name", "tool_call_id")

SPLITS = {  # split -> words in a file's or folder's name that stand for it
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def plain(name: str) -> str:
    """A column's name without case, plural and punctuation."""
    words = re.sub(r"[\W_]+", " ", name).strip().lower()
    return words[:-1] if words.endswith("s") and not words.endswith("ss") else words


USUAL = {role: frozenset(map(plain, names)) for role, names in COLUMNS.items()}


def candidates(role: str, columns: Iterable[str]) -> list[str]:
    """Columns that usually hold `role`."""
    return [column for column in columns if plain(column) in USUAL.get(role, ())]


def listed(names: Sequence[str], most: int = 20) -> str:
    """Names for a message, at most `most`, made safe for a terminal."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return (
        ", ".join(f"'{shown(name)}'" if "," in name else shown(name) for name in names[:most])
        + more
    )


def shown(name: str, limit: int = 60) -> str:
    """A name with unprintable characters escaped, cut to `limit` characters."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name[: limit + 1])
    return text if len(text) <= limit else text[:limit] + "..."


def shorten(value: object, limit: int = 60) -> str:
    """`value` as Python writes it, cut to about `limit` characters: for messages."""
    text = repr(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit + 2 else text[:limit] + "..."
