"""An interpreter for the part of Go's text/template that our Modelfile uses.

It shows what Ollama would write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

ACTION = re.compile(
    r'\{\{((?:"(?:\\.|[^"\\])*"|[^"])*?)\}\}', re.DOTALL
)  # }} within quotes ends nothing


def render(template: str, messages: Sequence[dict[str, str]]) -> str:
    tokens: list[tuple[str, str]] = []
    end = 0
    for match in ACTION.finditer(template):
        tokens += [("text", template[end : match.start()]), ("do", match.group(1).strip())]
        end = match.end()
    tokens.append(("text", template[end:]))
    out, rest = _block(tokens, list(messages), None)
    assert not rest, rest
    return out


def _block(tokens, messages, current):
    """Render up to `end` or `else`.

    Returns what was written and the remaining tokens.
    """
    out = ""
    while tokens:
        kind, text = tokens[0]
        if kind == "do" and (text == "end" or text.startswith("else")):
            return out, tokens
        tokens = tokens[1:]
        if kind == "text":
            out += text
        elif text.startswith('"'):
            out += json.loads(text.replace("\\x22", '\\"'))
        elif text == ".Content":
            out += current["content"]
        elif text.startswith("range"):
            assert text == "range .Messages"
            after = tokens
            for message in messages:
                piece, after = _block(tokens, messages, message)
                out += piece
            assert after[0] == ("do", "end")
            tokens = after[1:]
        elif text.startswith("if "):
            piece, tokens = _if(text[3:], tokens, messages, current)
            out += piece
        else:
            assert text == "$first := index .Messages 0", text
    return out, tokens


def _if(condition, tokens, messages, current):
    truth = _true(condition, messages, current)
    piece, tokens = _block(tokens, messages, current)
    out = piece if truth else ""
    while tokens[0][1].startswith("else"):
        condition = tokens[0][1].removeprefix("else").removeprefix(" if ").strip()
        now = not truth and (not condition or _true(condition, messages, current))
        piece, tokens = _block(tokens[1:], messages, current)
        out += piece if now else ""
        truth = truth or now
    return out, tokens[1:]


def _true(condition, messages, current):
    operator, place, value = condition.split(" ")
    role = messages[0]["role"] if place == "$first.Role" else current["role"]
    return (role == json.loads(value)) == (operator == "eq")
