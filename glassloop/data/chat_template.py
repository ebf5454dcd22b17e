"""The tokenizer's own chat template as parts, with supervision.

The template is rendered with a mark from Unicode's private use area in place of each content,
whitespace at a content's ends left in place so that a template that trims does trim. Between the
marks stands what the template wrote. What it renders as generation prompt for the turns before an
assistant turn must be how its rendering of the whole begins: from there on that turn is supervised,
up to its end token. If the template ends no turn, the last one gets EOS. If the template writes an
empty think block into answers without reasoning, as Qwen3's does, that is its own form and stays.

Names and arguments of tool calls are rendered as they are, since templates write them as JSON; a
row whose calls or tools spell a control token is a fault.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from glassloop.config.data import template_values
from glassloop.data.bounded import TemplateError, bounded
from glassloop.data.names import shorten
from glassloop.data.rows import RowFault, Turn
from glassloop.data.tokens import Codec, Part, answer, literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For templates that write a date: the one that Llama's fall back to.
TODAY = datetime.date(2024, 7, 26)
# (turns, generation prompt?, tools) -> what the template writes.
Parts = Callable[[Sequence[Turn], bool, str | None], list[Part]]
LONGEST = 1_000_000  # characters that a template writes around contents
MessageOf = Callable[[Turn], dict[str, Any]]  # what apply_chat_template takes for a turn
Render = Callable[[Sequence[Turn], bool], str]
CURE = (
    "set data.template=r1 or instruct, or use rows without reasoning or with one assistant turn "
    "only"
)
SYSTEM_CURE = (
    "set data.system_turn=user to put the system prompt before the first question, or "
    "data.system_turn=drop to leave it out"
)


def chat_parts(
    codec: Codec, tokenizer: PreTrainedTokenizerBase, arguments: Sequence[str] = ()
) -> tuple[Parts, MessageOf, str, tuple[int, ...], bool, bool]:
    """Make the template a function.

    Returns it with its messages, jinja source, stop ids, whether it lists tools, and whether it
    leaves the reasoning of earlier answers out.

    Reasoning becomes part of the content, in think tags as the row has them or on lines of their
    own, if the template writes that once and whole; else it goes beside the content as
    `reasoning_content`, if the template writes that.

    Args:
        arguments: data.template_args. They are set at the beginning of the jinja source, so that
            whoever renders the saved template gets the prompts of training.

    Raises:
        ValueError: the tokenizer has no chat template, or it does not read an argument.
    """
    source = _with_arguments(_source(tokenizer), arguments)
    skeletons: dict[str, str] = {}

    def render(
        turns: Sequence[Turn], generation_prompt: bool, apart: bool, tools: str | None = None
    ) -> str:
        """Text with marks for contents, shared by rows of one shape."""
        messages = [_marked(turn, place, apart) for place, turn in enumerate(turns)]
        shape = repr((messages, generation_prompt, tools))
        if (text := skeletons.get(shape)) is None:
            text = _render(tokenizer, source, messages, generation_prompt, tools)
            if tools is None and not any(turn.extra for turn in turns):
                skeletons[shape] = text
        return text

    probe = [Turn("user", "u"), Turn("assistant", "a", "r")]
    tail = render([probe[0], Turn("assistant", "a")], False, False).rpartition(_mark(1, "c"))[2]
    end = next((part for part, _ in literal(codec, tail) if isinstance(part, int)), codec.end)
    stop_ids = tuple(dict.fromkeys((end, codec.end)))
    ways = [apart for apart in (False, True) if _writes_reasoning(render(probe, False, apart))]
    apart = ways[0] if ways else None

    def parts(turns: Sequence[Turn], generation_prompt: bool, tools: str | None) -> list[Part]:
        if apart is None and any(turn.reasoning is not None for turn in turns):
            raise RowFault(
                "reasoning that the template drops",
                "data.template = chat: the tokenizer's chat template drops or doubles reasoning; "
                + CURE,
            )
        _check_calls(codec, turns, tools)
        before: Render = lambda some, prompt: render(some, prompt, bool(apart), tools)  # noqa: E731
        return _parts(codec, before, turns, generation_prompt, stop_ids)

    def message(turn: Turn) -> dict[str, Any]:
        shaped = _shaped(turn, bool(apart))
        return _message(shaped, shaped.content, shaped.reasoning, bool(apart))

    tool = [{"type": "function", "function": {"name": "glassloop_probe", "parameters": {}}}]
    listing = "glassloop_probe" in render(probe[:1], False, False, json.dumps(tool))
    asked_twice = [*probe, Turn("user", "v"), probe[1]]
    earlier = False
    with contextlib.suppress(RowFault):  # a template that takes one question: rows say so
        earlier = apart is not None and _mark(1, "r") not in render(asked_twice, False, apart)
    return parts, message, source, stop_ids, listing, earlier


def _check_calls(codec: Codec, turns: Sequence[Turn], tools: str | None) -> None:
    """Raise RowFault if a tool or its call spells a control token."""
    packed = [turn.extra for turn in turns if turn.extra] + ([tools] if tools else [])
    for text in (text for one in packed for text in _strings(json.loads(one))):
        if spelled := codec.spelled(text):
            raise RowFault(
                "control token in a tool call",
                f"a tool or its call spells the control token {min(spelled)} in {shorten(text)}; "
                "leave the row out",
            )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _writes_reasoning(text: str) -> bool:
    """True if user, reasoning and content stand once, in order.

    Between the last two stands one closing tag at most.
    """
    places = [text.find(mark) for mark in (_mark(0, "c"), _mark(1, "r"), _mark(1, "c"))]
    return (
        -1 not in places
        and places == sorted(places)
        and text[places[0] : places[2]].count("</think>") <= 1
    )


def _shaped(turn: Turn, apart: bool) -> Turn:
    """The turn as written; reasoning beside the content loses outer breaks."""
    if not apart or not turn.inline or turn.reasoning is None:
        return turn
    return replace(turn, reasoning=turn.reasoning.strip("\n"), content=turn.content.lstrip("\n"))


def _message(turn: Turn, content: str, reasoning: str | None, apart: bool) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": content}
    if turn.extra is not None:
        message |= json.loads(turn.extra)
    if reasoning is None:
        return message
    if apart:
        return message | {"reasoning_content": reasoning}
    if turn.inline:
        return message | {"content": f"<think>{reasoning}</think>{content}"}
    return message | {"content": f"<think>\n{reasoning}\n</think>\n\n{content}"}


def _source(tokenizer: PreTrainedTokenizerBase) -> str:
    source = tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    if not source:
        name = tokenizer.name_or_path
        raise ValueError(
            f"data.template = chat: the tokenizer of {name} has no chat template; set "
            "data.template=instruct"
        )
    # A prompt that changed with the day of the run could not be what training saw.
    return re.sub(
        r"strftime_now\(\s*(['\"])(.*?)\1\s*\)",
        lambda match: repr(TODAY.strftime(match.group(2))),
        source,
    )


def _with_arguments(source: str, arguments: Sequence[str]) -> str:
    """The template with its arguments set."""
    found = []
    for name, value in template_values(arguments).items():
        if not re.search(rf"\b{name}\b", source):
            raise ValueError(
                f"data.template_args.{name}: the tokenizer's chat template reads no such argument; "
                "leave it out"
            )
        found.append(f"{{% set {name} = {json.dumps(value)} %}}")
    return "".join(found).replace("= null %", "= none %") + source


def _render(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    messages: list[dict[str, Any]],
    generation_prompt: bool,
    tools: str | None,
) -> str:
    roles = [message["role"] for message in messages]
    kind = "refused by the chat template"
    refusal = (
        f"data.template = chat: the tokenizer's chat template refuses turns {', '.join(roles)}"
    )
    cure = SYSTEM_CURE if "system" in roles else CURE
    try:
        with bounded("it"):
            text = tokenizer.apply_chat_template(
                messages,
                tools=None if tools is None else json.loads(tools),
                chat_template=source,
                add_generation_prompt=generation_prompt,
                tokenize=False,
            )
    except TemplateError as error:
        raise RowFault(kind, f"{refusal}: {error}; {cure}") from error
    if len(text) > LONGEST:
        raise RowFault(kind, f"{refusal}: it writes {len(text):,} characters of its own; {cure}")
    return str(text)


def _mark(place: int, what: str) -> str:
    """Stands for the content ("c") or the reasoning ("r") of a turn."""
    return f"\ue000{place}{what}\ue001"


MARK = re.compile("\ue000(\\d+)([cr])\ue001")


def _marked(turn: Turn, place: int, apart: bool) -> dict[str, Any]:
    """A turn's message with marks for content and reasoning, outer whitespace kept."""

    def mark(text: str, what: str) -> str:
        core = text.strip()
        before, _, after = text.partition(core) if core else ("", "", "")
        return before + _mark(place, what) + after

    shaped = _shaped(turn, apart)
    content = mark(shaped.content, "c") if _has_content(turn) else ""
    reasoning = None if shaped.reasoning is None else mark(shaped.reasoning, "r")
    return _message(shaped, content, reasoning, apart)


def _has_content(turn: Turn) -> bool:
    """False for a turn that only calls tools."""
    return turn.extra is None or bool(turn.content.strip()) or turn.role != "assistant"


def _parts(
    codec: Codec,
    render: Render,
    turns: Sequence[Turn],
    generation_prompt: bool,
    stop_ids: tuple[int, ...],
) -> list[Part]:
    text = render(turns, generation_prompt)
    expected = [
        _mark(place, what)
        for place, turn in enumerate(turns)
        for what in ("r" * (turn.reasoning is not None) + "c" * _has_content(turn))
    ]
    cure = SYSTEM_CURE if turns and turns[0].role == "system" else CURE
    called = [call["function"]["name"] for turn in turns for call in _calls_of(turn)]
    if any(name not in text for name in called):
        raise RowFault(
            "tool calls",
            "data.template = chat: the tokenizer's chat template writes no tool calls; leave such "
            "rows out or choose a model whose template does",
        )
    found = [match.group() for match in MARK.finditer(text)]
    # Templates of reasoning models leave out what was thought before the last question.
    asked = max((place for place, turn in enumerate(turns) if turn.role == "user"), default=0)
    left_out = {_mark(place, "r") for place in range(asked)} - {*found}
    if found != [mark for mark in expected if mark not in left_out]:
        raise RowFault(
            "text that the template drops",
            "data.template = chat: the tokenizer's chat template drops, repeats or moves text of a "
            f"turn; {cure}",
        )
    marks = [*MARK.finditer(text)]
    spans: list[tuple[int, int, bool]] = []  # (begin, end) of an assistant turn; supervised?
    ended = True
    for place, turn in enumerate(turns):
        if turn.role == "assistant":
            before = render(turns[:place], True)
            if not text.startswith(before):
                raise RowFault(
                    "answer without the generation prompt",
                    "data.template = chat: the tokenizer's template does not write its own "
                    f"generation prompt before an answer (...{before[-40:]!r}), so training would "
                    f"not see what generation sees; {cure}",
                )
            own = [mark.end() for mark in marks if int(mark.group(1)) == place]
            behind = max(own, default=len(before))
            until = next((mark.start() for mark in marks if mark.start() >= behind), len(text))
            marks_of_control = codec.pattern.finditer(text, behind, until)
            end = next(
                (match.end() for match in marks_of_control if codec.control_of(match) in stop_ids),
                None,
            )
            ended = end is not None
            spans.append((len(before), behind if end is None else end, turn.trained))
    # A row ends in its end token: what a template writes behind the last one is left out.
    whole = not generation_prompt and turns[-1].role == "assistant"
    cuts = {0, spans[-1][1] if whole else len(text), *(cut for span in spans for cut in span[:2])}
    cuts.update(edge for mark in marks for edge in mark.span())
    parts: list[Part] = []
    for start, stop in itertools.pairwise(sorted(cuts)):
        supervised = any(begin <= start < end and learned for begin, end, learned in spans)
        if mark := next((mark for mark in marks if mark.start() == start), None):
            turn = turns[int(mark.group(1))]
            own_text = (turn.content if mark.group(2) == "c" else turn.reasoning or "").strip()
            if turn.role == "assistant":
                parts += answer(codec, own_text, supervised)
            else:
                parts.append((own_text, supervised))
        else:
            parts += literal(codec, text[start:stop], supervised)
    return parts if ended or not whole else [*parts, (stop_ids[0], turns[-1].trained)]


def _calls_of(turn: Turn) -> list[Any]:
    return [] if turn.extra is None else json.loads(turn.extra).get("tool_calls", [])
