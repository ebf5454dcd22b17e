"""The tokenizer's own chat template, whatever it is: what it writes around contents, and which part of it the model learns to
write.

The template is rendered with a mark from Unicode's private use area in place of each content, whitespace at a content's ends
left in place so that a template that trims does trim. Between the marks stands what the template wrote. What it renders as
generation prompt for the turns before an assistant turn must be how its rendering of the whole begins: from there on that turn
is supervised, up to its end token.
"""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from glassloop.rows import Turn
from glassloop.tokens import Codec, Part, literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TODAY = datetime.date(2024, 7, 26)  # for templates that write a date: the one that Llama's fall back to
Parts = Callable[[Sequence[Turn], bool], list[Part]]  # (turns, generation prompt?) -> what the template writes
CURE = "set data.template=r1 or instruct, or use rows without reasoning or with one assistant turn only"


def chat_parts(codec: Codec, tokenizer: PreTrainedTokenizerBase) -> tuple[Parts, str, tuple[int, ...]]:
    """The template as a function, the jinja source to save, the stop ids. Raises ValueError for a tokenizer without a chat
    template.

    Reasoning becomes part of the content, `<think>\\n...\\n</think>\\n\\n`.
    """
    source = _source(tokenizer)
    skeletons: dict[tuple[object, ...], str] = {}

    def render(turns: Sequence[Turn], generation_prompt: bool) -> str:
        """Text with marks for contents. Rows share it wherever roles and outer whitespace are equal."""
        messages = [{"role": turn.role, "content": _marked(turn, place)} for place, turn in enumerate(turns)]
        shape = (generation_prompt, *((message["role"], message["content"]) for message in messages))
        if shape not in skeletons:
            skeletons[shape] = _render(tokenizer, source, messages, generation_prompt)
        return skeletons[shape]

    tail = render([Turn("user", "u"), Turn("assistant", "a")], False).rpartition(_mark(1, "content"))[2]
    end = next((part for part, _ in literal(codec, tail) if isinstance(part, int)), codec.end)
    stop_ids = tuple(dict.fromkeys((end, codec.end)))

    def parts(turns: Sequence[Turn], generation_prompt: bool) -> list[Part]:
        return _parts(codec, render, turns, generation_prompt, stop_ids)

    return parts, source, stop_ids


def _source(tokenizer: PreTrainedTokenizerBase) -> str:
    source = tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    if not source:
        name = tokenizer.name_or_path
        raise ValueError(f"data.template = chat: the tokenizer of {name} has no chat template; set data.template=instruct")
    # A prompt that changed with the day of the run could not be what training saw.
    return re.sub(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", lambda match: repr(TODAY.strftime(match.group(2))), source)


def _render(tokenizer: PreTrainedTokenizerBase, source: str, messages: list[dict[str, str]], generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=source, add_generation_prompt=generation_prompt, tokenize=False
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"data.template = chat: the tokenizer's chat template refuses turns {roles}: {error}; {CURE}") from error
    return str(text)


def _mark(place: int, what: str) -> str:
    return f"\ue000{place}{what[0]}\ue001"


MARK = re.compile("\ue000(\\d+)([cr])\ue001")


def _marked(turn: Turn, place: int) -> str:
    def mark(text: str, what: str) -> str:
        core = text.strip()
        before, _, after = text.partition(core) if core else ("", "", "")
        return before + _mark(place, what) + after

    content = mark(turn.content, "content")
    return content if turn.reasoning is None else f"<think>\n{mark(turn.reasoning, 'reasoning')}\n</think>\n\n{content}"


def _parts(
    codec: Codec, render: Callable[..., str], turns: Sequence[Turn], generation_prompt: bool, stop_ids: tuple[int, ...]
) -> list[Part]:
    text = render(turns, generation_prompt)
    expected = [mark.group() for place, turn in enumerate(turns) for mark in MARK.finditer(_marked(turn, place))]
    if [match.group() for match in MARK.finditer(text)] != expected:
        raise ValueError(f"data.template = chat: the tokenizer's chat template drops, repeats or moves text of a turn; {CURE}")
    marks = [*MARK.finditer(text)]
    spans = []  # (begin, end) in text of what is supervised
    ended = True
    for place, turn in enumerate(turns):
        if turn.role == "assistant":
            before = render(turns[:place], True)
            if not text.startswith(before):
                raise ValueError(
                    "data.template = chat: the tokenizer's template does not write its own generation prompt before an answer "
                    f"(...{before[-40:]!r}), so training would not see what generation sees; {CURE}"
                )
            behind = next(mark.end() for mark in marks if mark.group() == _mark(place, "content"))
            until = next((mark.start() for mark in marks if mark.start() >= behind), len(text))
            marks_of_control = codec.pattern.finditer(text, behind, until)
            end = next((match.end() for match in marks_of_control if codec.control_of(match) in stop_ids), None)
            ended = end is not None
            spans.append((len(before), behind if end is None else end))
    # What a template writes behind the last end token of a whole conversation is left out: a row ends in its end token.
    whole = not generation_prompt and turns[-1].role == "assistant"
    cuts = {0, spans[-1][1] if whole else len(text), *(cut for span in spans for cut in span)}
    cuts.update(edge for mark in marks for edge in mark.span())
    parts: list[Part] = []
    for start, stop in itertools.pairwise(sorted(cuts)):
        supervised = any(begin <= start < end for begin, end in spans)
        if mark := next((mark for mark in marks if mark.start() == start), None):
            turn = turns[int(mark.group(1))]
            parts.append(((turn.content if mark.group(2) == "c" else turn.reasoning or "").strip(), supervised))
        else:
            parts += literal(codec, text[start:stop], supervised)
    return parts if ended or not whole else [*parts, (stop_ids[0], True)]
