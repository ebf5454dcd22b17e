"""Templates that glassloop writes itself: r1 and instruct.

Each is a function from turns to parts, and the jinja source that gives the same prompt elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from glassloop.data.chat_template import MessageOf, Parts
from glassloop.data.rows import RowFault, Turn
from glassloop.data.tokens import Codec, Part, answer, literal

R1_MARKS = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
PREAMBLE = "Write a response that answers the question below."
THINK_FIRST = " Before you answer, think it through step by step, so that the answer is sound."
INSTRUCTION = "You know the field of the question well. Answer it."


def _answer(codec: Codec, turn: Turn, opens_think: bool, join: str) -> list[Part]:
    """Reasoning in its tags, if there is any, and the answer.

    Supervised, if the turn is, but for the `<think>` that the prompt has written already.
    """
    learned = turn.trained
    if turn.reasoning is None:
        if opens_think:
            raise RowFault(
                "no reasoning behind <think>",
                "an assistant turn has no reasoning, but the prompt opens <think>: give "
                "make_template all rows of the run",
            )
        return answer(codec, turn.content.strip(), learned)
    return [
        *([] if opens_think else literal(codec, "<think>\n", learned)),
        *answer(codec, turn.reasoning.strip(), learned),
        ("\n", learned),
        *literal(codec, "</think>", learned),
        (join, learned),
        *answer(codec, turn.content.strip(), learned),
    ]


def _without_tools(name: str, turns: Sequence[Turn]) -> None:
    """Raise RowFault for a conversation that calls tools."""
    if any(turn.extra is not None for turn in turns if turn.role != "user"):
        raise RowFault(
            "tool calls",
            f"data.template = {name} writes no tool calls; set data.template=chat for a tokenizer "
            "whose own template does",
        )


def message_of(join: str) -> MessageOf:
    """Messages with reasoning within the content, stripped as in training.

    `join` stands between </think> and the answer.
    """

    def message(turn: Turn) -> dict[str, Any]:
        content = turn.content.strip() if turn.role == "assistant" else turn.content
        if turn.reasoning is not None:
            content = f"<think>\n{turn.reasoning.strip()}\n</think>{join}{content}"
        return {"role": turn.role, "content": content}

    return message


def r1(codec: Codec, begin: int, opens_think: bool) -> Parts:
    prompt = literal(codec, "<｜Assistant｜><think>\n" if opens_think else "<｜Assistant｜>")

    def parts(turns: Sequence[Turn], generation_prompt: bool, tools: str | None) -> list[Part]:
        _without_tools("r1", turns)
        result: list[Part] = [(begin, False)]
        for turn in turns:
            if turn.role == "assistant":
                written = _answer(codec, turn, opens_think, "\n\n")
                result += [*prompt, *written, (codec.end, turn.trained)]
            else:
                result += [
                    *(literal(codec, "<｜User｜>") if turn.role == "user" else []),
                    (turn.content, False),
                ]
        return result + (prompt if generation_prompt else [])

    return parts


def r1_source(opens_think: bool) -> str:
    prompt = "<｜Assistant｜>" + (r"<think>\n" if opens_think else "")
    return (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] }}"
        "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ '<｜Assistant｜>' + message['content'] + eos_token }}"
        "{% else %}{{ raise_exception('This template has no role ' + message['role']) }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '" + prompt + "' }}{% endif %}"
    )


def instruct(codec: Codec, opens_think: bool) -> Parts:
    begin: list[Part] = [] if codec.begin is None else [(codec.begin, False)]

    def parts(turns: Sequence[Turn], generation_prompt: bool, tools: str | None) -> list[Part]:
        _without_tools("instruct", turns)
        roles = [turn.role for turn in turns]
        system = turns[0].content if roles[:1] == ["system"] else INSTRUCTION
        asked = roles[1:] if roles[:1] == ["system"] else roles
        if asked != (["user"] if generation_prompt else ["user", "assistant"]):
            raise RowFault(
                "not one question and answer",
                "data.template = instruct writes a question and its answer, not "
                f"{', '.join(roles)}; set data.template=r1 or chat",
            )
        question = turns[len(roles) - len(asked)].content
        preamble = PREAMBLE + (THINK_FIRST if opens_think else "")
        prompt: list[Part] = [
            (
                f"{preamble}\n\n### Instruction:\n{system}\n\n### Question:\n{question}\n\n"
                "### Response:\n",
                False,
            )
        ]
        if opens_think:
            prompt += literal(codec, "<think>")
        if generation_prompt:
            return begin + prompt
        learned = turns[-1].trained
        opened: list[Part] = [("\n", learned)] if opens_think else []
        written = _answer(codec, turns[-1], opens_think, "\n")
        return [*begin, *prompt, *opened, *written, (codec.end, learned)]

    return parts


def instruct_source(codec: Codec, opens_think: bool) -> str:
    preamble = PREAMBLE + (THINK_FIRST if opens_think else "")
    think = "<think>" if opens_think else ""
    return (
        ("" if codec.begin is None else "{{ bos_token }}")
        + "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
        + "{% set asked = messages[1:] %}"
        + "{% else %}{% set system = '"
        + INSTRUCTION
        + "' %}{% set asked = messages %}{% endif %}"
        + "{% if asked | length > 2 %}"
        + "{{ raise_exception('This template has one question and one answer') }}{% endif %}"
        + "{{ '"
        + preamble
        + r"\n\n### Instruction:\n' + system + '\n\n### Question:\n' + asked[0]['content']"
        + r" + '\n\n### Response:\n' }}"
        + "{% if asked | length > 1 %}{{ asked[1]['content'] + eos_token }}"
        + "{% elif add_generation_prompt %}{{ '"
        + think
        + "' }}{% endif %}"
    )
