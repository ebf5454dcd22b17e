"""Ollama's Modelfile for a merged model: a Go template, stops, sampling.

The Go template writes the very text of the training prompt. It is found by rendering the chat
template with marks instead of contents, and taking the text between the marks. It is used only if
it gives the chat template's text on conversations that it was not made from; a template that is not
made of such pieces is refused.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glassloop.data.bounded import TemplateError, bounded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
# Ollama's parameter -> field of generation_config.json and its neutral value. Each is written,
# since Ollama's own defaults (temperature 0.8, top_k 40, top_p 0.9, repeat_penalty 1.1; its
# docs/modelfile.md) would replace what is missing.
SAMPLING = {
    "temperature": ("temperature", 1),
    "top_p": ("top_p", 1),
    "top_k": ("top_k", 0),
    "min_p": ("min_p", 0),
}


@dataclass(frozen=True)
class Pieces:
    """Text around contents.

    `default` comes first without a system message; `turn` and `end` are None if a template takes
    one question only.
    """

    system: tuple[str, str]
    default: str
    user: tuple[str, str]
    assistant: tuple[str, str] | None
    prompt: str  # the generation prompt

    def render(self, messages: Sequence[Message]) -> str:
        """Write what the Go template writes, for checks."""
        out = "" if messages and messages[0]["role"] == "system" else self.default
        for message in messages:
            before, after = getattr(self, message["role"])
            out += before + message["content"] + after
        return out + self.prompt

    def go(self) -> str:
        """Write a Go template over Ollama's .Messages."""
        has_system = (
            '{{ $first := index .Messages 0 }}{{ if ne $first.Role "system" }}'
            + quoted(self.default)
            + "{{ end }}"
        )
        kinds = [
            ("system", self.system),
            ("user", self.user),
            *([("assistant", self.assistant)] if self.assistant else []),
        ]
        cases = [
            f'eq .Role "{role}" }}}}{quoted(before)}{{{{ .Content }}}}{quoted(after)}'
            for role, (before, after) in kinds
        ]
        body = "{{ if " + "{{ else if ".join(cases) + "{{ end }}"
        return has_system + "{{ range .Messages }}" + body + "{{ end }}" + quoted(self.prompt)


def quoted(text: str) -> str:
    """Quote literal text of a Go template that could mean something else."""
    if any(odd in text for odd in ("{{", "}}", '"', "\\")):
        return "{{ " + json.dumps(text, ensure_ascii=False).replace('\\"', "\\x22") + " }}"
    return text


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    with bounded("the chat template"):
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
    return str(text)


def _mark(n: int) -> str:
    return f"\ue000{n}\ue001"


def _between(tokenizer: Any, roles: Sequence[str]) -> list[str] | None:
    """Return the text before, between and after marked contents.

    None if the template refuses these roles or loses a content.
    """
    try:
        text = render_chat(
            tokenizer, [{"role": role, "content": _mark(i)} for i, role in enumerate(roles)]
        )
    except TemplateError:
        return None
    parts = []
    for i in range(len(roles)):
        before, found, text = text.partition(_mark(i))
        if not found:
            return None
        parts.append(before)
    return [*parts, text]


def _common(texts: Sequence[str]) -> str:
    """The longest beginning that all have."""
    return "".join(
        column[0]
        for column in itertools.takewhile(
            lambda column: len(set(column)) == 1, zip(*texts, strict=False)
        )
    )


def pieces_of(tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """Find the pieces of the tokenizer's chat template.

    Raises:
        ValueError: it is not made of pieces.
    """
    alone, led, talk = (
        _between(tokenizer, roles.split())
        for roles in ("user", "system user", "user assistant user")
    )
    refusal = (
        "the chat template cannot be written as Ollama's: serve it with vLLM, or write TEMPLATE by "
        "hand"
    )
    if alone is None:
        raise ValueError(f"{refusal} (it refuses a single question)")
    starts = [alone[0], *([led[1]] if led else []), *([talk[2]] if talk else [])]
    user_before = _common([one[::-1] for one in starts])[::-1]
    bos = str(tokenizer.bos_token or "")
    if bos and alone[0].startswith(bos):  # BOS stays whole, at the front, where it can be left out
        user_before = user_before[-(len(alone[0]) - len(bos)) :] if len(alone[0]) > len(bos) else ""
    user_after = _common([alone[1], talk[1]]) if talk else ""
    prompt = alone[1].removeprefix(user_after)

    def front(text: str) -> str:
        return text[: len(text) - len(user_before)]

    pieces = Pieces(
        system=(led[0], front(led[1])) if led else ("", ""),
        default=front(alone[0]),
        user=(user_before, user_after),
        assistant=(talk[1].removeprefix(user_after), front(talk[2])) if talk else None,
        prompt=prompt,
    )
    probes = [
        ["user"],
        *([["system", "user"]] if led else []),
        *([["user", "assistant", "user"]] if talk else []),
    ]
    if led and talk:
        probes += [
            ["system", "user", "assistant", "user"],
            ["user", "assistant", "user", "assistant", "user"],
        ]
    for roles in probes:
        messages = [
            {"role": role, "content": f"{role} says\nthis {i}"} for i, role in enumerate(roles)
        ]
        wanted = render_chat(tokenizer, messages)
        if pieces.render(messages) != wanted:
            raise ValueError(f"{refusal} (it writes {' '.join(roles)} otherwise than from pieces)")
    return pieces


def without_bos(pieces: Pieces, bos: str | None) -> Pieces:
    """Remove BOS from the pieces, for a server that adds it itself."""
    if not bos:
        return pieces
    system = (pieces.system[0].removeprefix(bos), pieces.system[1])
    return Pieces(
        system, pieces.default.removeprefix(bos), pieces.user, pieces.assistant, pieces.prompt
    )


def modelfile(
    tokenizer: PreTrainedTokenizerBase,
    generation: dict[str, Any],
    *,
    adds_bos: bool,
    source: str,
    context: int,
) -> str:
    """The Modelfile's text.

    Args:
        generation: fields of generation_config.json.
        adds_bos: the server puts BOS before a prompt, as the tokenizer does.
        source: what FROM names: the folder of safetensors, or a GGUF file.
    """
    pieces = pieces_of(tokenizer)
    if adds_bos:
        pieces = without_bos(pieces, tokenizer.bos_token)  # type: ignore[arg-type]
    template = pieces.go()
    if '"""' in template:
        raise ValueError(
            'the chat template holds """, which a Modelfile cannot: serve it with vLLM'
        )
    stops = generation.get("eos_token_id")
    stops = [] if stops is None else [stops] if isinstance(stops, int) else stops
    lines = [f"FROM {source}", f'TEMPLATE """{template}"""']
    lines += [
        f"PARAMETER stop {json.dumps(tokenizer.convert_ids_to_tokens(stop), ensure_ascii=False)}"
        for stop in stops
    ]
    if generation.get("do_sample"):
        for name, (field, neutral) in SAMPLING.items():
            lines.append(
                f"PARAMETER {name} "
                f"{neutral if generation.get(field) is None else generation[field]}"
            )
    else:
        lines.append("PARAMETER temperature 0")
    lines.append(f"PARAMETER repeat_penalty {generation.get('repetition_penalty') or 1}")
    return "\n".join([*lines, f"PARAMETER num_ctx {context}", ""])
