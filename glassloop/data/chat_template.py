"""The tokenizer's own chat template, whatever it is: what it writes around contents, and which part of it the model learns to
write.

The template is rendered with a mark from Unicode's private use area in place of each content, whitespace at a content's ends
left in place so that a template that trims does trim. Between the marks stands what the template wrote. What it renders as
generation prompt for the turns before an assistant turn must be how its rendering of the whole begins: from there on that turn
is supervised, up to its end token. If the template ends no turn, the last one gets EOS. If the template writes an empty think
block into answers without reasoning, as Qwen3's does, that is its own form and stays.
"""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from glassloop.data.bounded import TemplateError, bounded
from glassloop.data.rows import Turn
from glassloop.data.tokens import Codec, Part, literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TODAY = datetime.date(
    2024, 7, 26
)  # for templates that write a date: the one that Llama's fall back to
Parts = Callable[
    [Sequence[Turn], bool], list[Part]
]  # (turns, generation prompt?) -> what the template writes
LONGEST = 1_000_000  # characters that a template writes around contents
MessageOf = Callable[[Turn], dict[str, str]]  # what apply_chat_template takes for a turn
CURE = "set data.template=r1 or instruct, or use rows without reasoning or with one assistant turn only"


def chat_parts(
    codec: Codec, tokenizer: PreTrainedTokenizerBase
) -> tuple[Parts, MessageOf, str, tuple[int, ...]]:
    """The template as a function, messages as it takes them, the jinja source to save, the stop ids.

    Reasoning becomes part of the content, `<think>\\n...\\n</think>\\n\\n`, where the template writes that once and whole; else
    it goes beside the content as `reasoning_content`, where the template writes that. Raises ValueError for a tokenizer without
    a chat template.
    """
    source = _source(tokenizer)
    skeletons: dict[str, str] = {}

    def render(turns: Sequence[Turn], generation_prompt: bool, apart: bool) -> str:
        """Text with marks for contents. Rows share it wherever roles and outer whitespace are equal."""
        messages = [
            _message(turn.role, *_marked(turn, place), apart) for place, turn in enumerate(turns)
        ]
        shape = repr((messages, generation_prompt))
        if shape not in skeletons:
            skeletons[shape] = _render(tokenizer, source, messages, generation_prompt)
        return skeletons[shape]

    probe = [Turn("user", "u"), Turn("assistant", "a", "r")]
    tail = render([probe[0], Turn("assistant", "a")], False, False).rpartition(_mark(1, "c"))[2]
    end = next((part for part, _ in literal(codec, tail) if isinstance(part, int)), codec.end)
    stop_ids = tuple(dict.fromkeys((end, codec.end)))
    ways = [apart for apart in (False, True) if _writes_reasoning(render(probe, False, apart))]
    apart = ways[0] if ways else None

    def marked(turns: Sequence[Turn], generation_prompt: bool) -> str:
        return render(turns, generation_prompt, bool(apart))

    def parts(turns: Sequence[Turn], generation_prompt: bool) -> list[Part]:
        if apart is None and any(turn.reasoning is not None for turn in turns):
            raise ValueError(
                f"data.template = chat: the tokenizer's chat template drops or doubles reasoning; {CURE}"
            )
        return _parts(codec, marked, turns, generation_prompt, stop_ids)

    return (
        parts,
        lambda turn: _message(turn.role, turn.content, turn.reasoning, bool(apart)),
        source,
        stop_ids,
    )


def _writes_reasoning(text: str) -> bool:
    """True where user, reasoning and content stand in `text` once and in order, with one closing tag at most between the last
    two."""
    places = [text.find(mark) for mark in (_mark(0, "c"), _mark(1, "r"), _mark(1, "c"))]
    return (
        -1 not in places
        and places == sorted(places)
        and text[places[0] : places[2]].count("</think>") <= 1
    )


def _message(role: str, content: str, reasoning: str | None, apart: bool) -> dict[str, str]:
    if reasoning is None:
        return {"role": role, "content": content}
    if apart:
        return {"role": role, "content": content, "reasoning_content": reasoning}
    return {"role": role, "content": f"<think>\n{reasoning}\n</think>\n\n{content}"}


def _source(tokenizer: PreTrainedTokenizerBase) -> str:
    source = tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    if not source:
        name = tokenizer.name_or_path
        raise ValueError(
            f"data.template = chat: the tokenizer of {name} has no chat template; set data.template=instruct"
        )
    # A prompt that changed with the day of the run could not be what training saw.
    return re.sub(
        r"strftime_now\(\s*(['\"])(.*?)\1\s*\)",
        lambda match: repr(TODAY.strftime(match.group(2))),
        source,
    )


def _render(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    messages: list[dict[str, str]],
    generation_prompt: bool,
) -> str:
    roles = ", ".join(message["role"] for message in messages)
    refusal = f"data.template = chat: the tokenizer's chat template refuses turns {roles}"
    try:
        with bounded("it"):
            text = tokenizer.apply_chat_template(
                messages,
                chat_template=source,
                add_generation_prompt=generation_prompt,
                tokenize=False,
            )
    except TemplateError as error:
        raise ValueError(f"{refusal}: {error}; {CURE}") from error
    if len(text) > LONGEST:
        raise ValueError(f"{refusal}: it writes {len(text):,} characters of its own; {CURE}")
    return str(text)


def _mark(place: int, what: str) -> str:
    """Stands for the content ("c") or the reasoning ("r") of a turn."""
    return f"\ue000{place}{what}\ue001"


MARK = re.compile("\ue000(\\d+)([cr])\ue001")


def _marked(turn: Turn, place: int) -> tuple[str, str | None]:
    """Content and reasoning, each as a mark with the whitespace around it."""

    def mark(text: str, what: str) -> str:
        core = text.strip()
        before, _, after = text.partition(core) if core else ("", "", "")
        return before + _mark(place, what) + after

    return mark(turn.content, "c"), None if turn.reasoning is None else mark(turn.reasoning, "r")


def _parts(
    codec: Codec,
    render: Callable[[Sequence[Turn], bool], str],
    turns: Sequence[Turn],
    generation_prompt: bool,
    stop_ids: tuple[int, ...],
) -> list[Part]:
    text = render(turns, generation_prompt)
    expected = [
        _mark(place, what)
        for place, turn in enumerate(turns)
        for what in ("c" if turn.reasoning is None else "rc")
    ]
    if [match.group() for match in MARK.finditer(text)] != expected:
        raise ValueError(
            f"data.template = chat: the tokenizer's chat template drops, repeats or moves text of a turn; {CURE}"
        )
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
            behind = next(mark.end() for mark in marks if mark.group() == _mark(place, "c"))
            until = next((mark.start() for mark in marks if mark.start() >= behind), len(text))
            marks_of_control = codec.pattern.finditer(text, behind, until)
            end = next(
                (match.end() for match in marks_of_control if codec.control_of(match) in stop_ids),
                None,
            )
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
            parts.append(
                (
                    (turn.content if mark.group(2) == "c" else turn.reasoning or "").strip(),
                    supervised,
                )
            )
        else:
            parts += literal(codec, text[start:stop], supervised)
    return parts if ended or not whole else [*parts, (stop_ids[0], True)]
