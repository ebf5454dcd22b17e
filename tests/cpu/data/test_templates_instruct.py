"""The instruct template, whole texts, turns without loss, tokens in answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from toys import (
    ANSWER,
    ASSISTANT,
    BOS,
    END_THINK,
    EOS,
    QUESTION,
    REASONING,
    THINK,
    THOUGHT,
    TWO,
    UNTHOUGHT,
    USER,
    mark,
    marks_in,
    r1,
    saved_prompt,
    spans,
    talk,
)
from transformers import PreTrainedTokenizerFast

from glassloop.config import DataConfig
from glassloop.data.own_templates import INSTRUCTION, PREAMBLE, THINK_FIRST
from glassloop.data.rows import Example, RowFault, Turn
from glassloop.data.templates import make_template
from glassloop.data.tokens import make_codec

pytestmark = pytest.mark.usefixtures("one_codec_a_tokenizer")

# instruct


@pytest.mark.parametrize(("examples", "think"), [((THOUGHT,), True), ((UNTHOUGHT,), False)])
def test_an_instruct_row_is_the_recipes_text_form(
    r1_toy: PreTrainedTokenizerFast, examples: tuple[Example, ...], think: bool
) -> None:
    template = make_template(DataConfig(template="instruct"), r1_toy, examples)
    head = (
        f"{BOS}{PREAMBLE}{THINK_FIRST if think else ''}\n\n### Instruction:\n{INSTRUCTION}\n\n"
        f"### Question:\n{QUESTION}\n\n### Response:\n"
    )
    row = template.encode(examples[0])
    assert r1_toy.decode(template.prompt_ids(examples[0])) == head + THINK * think
    assert [r1_toy.decode(span) for span in spans(row)] == [
        f"\n{REASONING}\n{END_THINK}\n{ANSWER}{EOS}" if think else ANSWER + EOS
    ]
    assert marks_in(r1_toy, row) == ([BOS, THINK, END_THINK, EOS] if think else [BOS, EOS])


def test_instruct_puts_the_system_turn_where_the_instruction_stands_and_its_saved_template_too(
    r1_toy: PreTrainedTokenizerFast,
) -> None:
    template = make_template(DataConfig(template="instruct"), r1_toy, (THOUGHT,))
    conversation = talk(
        ("system", "You know spiders."),
        *[(turn.role, turn.content, turn.reasoning) for turn in THOUGHT.turns],
    )
    text = r1_toy.decode(template.prompt_ids(conversation))
    assert "### Instruction:\nYou know spiders.\n\n###" in text
    assert INSTRUCTION not in text
    assert saved_prompt(r1_toy, template, conversation) == template.prompt_ids(conversation)


def test_instruct_refuses_a_conversation_of_several_answers(
    r1_toy: PreTrainedTokenizerFast,
) -> None:
    with pytest.raises(
        ValueError,
        match=r"row train:0: .*not user, assistant, user, assistant; set data\.template=r1 or chat",
    ):
        make_template(DataConfig(template="instruct"), r1_toy, (TWO,)).encode(TWO)


# Loss by turn, whole texts, tokens in answers


@pytest.mark.parametrize("name", ["r1", "instruct"])
def test_a_turn_without_loss_has_no_supervised_token(
    r1_toy: PreTrainedTokenizerFast, name: str
) -> None:
    for conversation in (TWO, THOUGHT) if name == "r1" else (THOUGHT,):
        template = make_template(DataConfig(template=name), r1_toy, (conversation,))  # type: ignore[arg-type]
        whole = template.encode(conversation)
        first = replace(conversation.turns[1], trained=False)
        marked = replace(
            conversation, turns=(conversation.turns[0], first, *conversation.turns[2:])
        )
        row = template.encode(marked)
        assert row.input_ids == whole.input_ids
        assert spans(row) == spans(whole)[1:]


def test_a_whole_text_is_bos_text_and_eos_supervised(r1_toy: PreTrainedTokenizerFast) -> None:
    text = f"Once {USER} upon a time, and so on. " * 3
    row_of_text = Example("train:0", (Turn("text", text),))
    for name in ("r1", "instruct"):
        template = make_template(DataConfig(template=name), r1_toy, (row_of_text,))  # type: ignore[arg-type]
        assert not template.opens_think
        row = template.encode(row_of_text)
        assert list(row.input_ids) == [
            mark(r1_toy, BOS),
            *ids_of_text(r1_toy, text),
            mark(r1_toy, EOS),
        ]
        assert row.supervised == (False,) + (True,) * (len(row) - 1)
        prompt = template.prompt_ids(row_of_text)
        assert list(row.input_ids[: len(prompt)]) == prompt
        assert 1 < len(prompt) <= 16


def ids_of_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids of text whose marks stay text."""
    return make_codec(tokenizer).opening.encode(text, add_special_tokens=False).ids


def test_an_answer_may_use_the_tokens_that_are_named_and_no_others(
    r1_toy: PreTrainedTokenizerFast,
) -> None:
    row_of_marks = talk(("user", USER + ASSISTANT), ("assistant", f"{USER} {ASSISTANT}", USER))
    plain = r1(r1_toy, (row_of_marks,)).encode(row_of_marks)
    assert marks_in(r1_toy, plain).count(USER) == 1
    template = r1(r1_toy, (row_of_marks,), answer_tokens=(USER,))
    row = template.encode(row_of_marks)
    assert marks_in(r1_toy, row) == [BOS, USER, ASSISTANT, THINK, USER, END_THINK, USER, EOS]
    assert row.supervised[-2]
    with pytest.raises(
        ValueError, match=r"data\.answer_tokens = <x>: .* has no such control token"
    ):
        r1(r1_toy, answer_tokens=("<x>",))


def test_tool_calls_under_r1_are_a_fault(r1_toy: PreTrainedTokenizerFast) -> None:
    calls = '{"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}'
    turns = (Turn("user", QUESTION), Turn("assistant", "", extra=calls))
    for name in ("r1", "instruct"):
        template = make_template(DataConfig(template=name), r1_toy, (UNTHOUGHT,))  # type: ignore[arg-type]
        (fault,) = template.try_encode([Example("train:0", turns)])
        assert isinstance(fault, RowFault)
        assert fault.kind == "tool calls"
        assert "set data.template=chat" in str(fault)
