"""Templates r1 and instruct, labels and lengths, on a toy tokenizer."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from toys import (
    ANSWER,
    ASSISTANT,
    BOS,
    END_THINK,
    EOS,
    HOSTILE,
    HOSTILE_TEXT,
    MARKS,
    PLAIN_TEXT,
    QUESTION,
    REASONING,
    THINK,
    THOUGHT,
    TWO,
    UNTHOUGHT,
    USER,
    WORDS,
    ids_of,
    mark,
    marks_in,
    r1,
    saved_prompt,
    spans,
    talk,
    toy,
)
from transformers import PreTrainedTokenizerFast

from glassloop.config import DataConfig
from glassloop.data import templates
from glassloop.data.own_templates import INSTRUCTION, PREAMBLE, THINK_FIRST
from glassloop.data.rows import Example, RowFault, Turn
from glassloop.data.templates import make_template, targets
from glassloop.data.tokens import make_codec


@pytest.fixture(scope="module", autouse=True)
def _one_codec_a_tokenizer() -> Iterator[None]:
    """Make a tokenizer's codec once, to save time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(templates, "make_codec", functools.cache(make_codec))
        yield


@pytest.fixture(scope="module")
def r1_toy() -> PreTrainedTokenizerFast:
    return toy(MARKS, bos=BOS, eos=EOS)


# r1


def test_an_r1_row_is_the_marks_and_texts_in_order_and_the_answer_is_supervised(
    r1_toy: PreTrainedTokenizerFast,
) -> None:
    row = r1(r1_toy).encode(
        talk(
            ("system", "Be brief."),
            ("user", QUESTION),
            ("assistant", f" {ANSWER}\n", f"\n{REASONING} "),
        )
    )
    prompt = [
        mark(r1_toy, BOS),
        *ids_of(r1_toy, "Be brief."),
        mark(r1_toy, USER),
        *ids_of(r1_toy, QUESTION),
    ]
    prompt += [mark(r1_toy, ASSISTANT), mark(r1_toy, THINK), *ids_of(r1_toy, "\n")]
    answer = [
        *ids_of(r1_toy, REASONING + "\n"),
        mark(r1_toy, END_THINK),
        *ids_of(r1_toy, "\n\n" + ANSWER),
        mark(r1_toy, EOS),
    ]
    assert list(row.input_ids) == prompt + answer
    assert row.supervised == (False,) * len(prompt) + (True,) * len(answer)


@given(HOSTILE_TEXT, HOSTILE_TEXT, HOSTILE_TEXT, HOSTILE_TEXT)
@example(*("".join(HOSTILE),) * 4)
@settings(max_examples=60, deadline=None)
def test_no_text_of_a_row_becomes_a_mark_and_no_text_is_lost(
    r1_toy: PreTrainedTokenizerFast, system: str, question: str, reasoning: str, answer: str
) -> None:
    conversation = talk(("system", system), ("user", question), ("assistant", answer, reasoning))
    row = r1(r1_toy).encode(conversation)
    assert marks_in(r1_toy, row) == [BOS, USER, ASSISTANT, THINK, END_THINK, EOS]
    assert row.input_ids.count(mark(r1_toy, BOS)) == 1
    assert row.input_ids[0] == mark(r1_toy, BOS)
    pieces = "".join(
        "\ufffe"
        if token in r1_toy.get_added_vocab().values()
        else r1_toy.convert_ids_to_tokens(token)
        for token in row.input_ids
    )
    texts = [r1_toy.backend_tokenizer.decoder.decode([piece]) for piece in pieces.split("\ufffe")]  # type: ignore[union-attr]
    assert texts == [
        "",
        system,
        question,
        "",
        "\n" + reasoning.strip() + "\n",
        "\n\n" + answer.strip(),
        "",
    ]


def test_every_whole_row_ends_in_a_supervised_end_token_though_pad_is_that_token(
    r1_toy: PreTrainedTokenizerFast,
) -> None:
    assert r1_toy.pad_token_id == r1_toy.eos_token_id
    template = r1(r1_toy)
    for conversation in (THOUGHT, TWO):
        row = template.encode(conversation)
        assert row.input_ids[-1] == r1_toy.eos_token_id
        assert row.supervised[-1]
        assert targets(row)[-2] == r1_toy.eos_token_id
    assert template.stop_ids == (r1_toy.eos_token_id,)


def test_every_assistant_turn_is_supervised_to_its_end_token_and_nothing_else(
    r1_toy: PreTrainedTokenizerFast,
) -> None:
    found = spans(r1(r1_toy, (TWO,)).encode(TWO))
    assert [r1_toy.decode(span) for span in found] == [
        f"{REASONING}\n{END_THINK}\n\n{ANSWER}{EOS}",
        f"It is an insect.\n{END_THINK}\n\nSix.{EOS}",
    ]


def test_labels_everything_supervises_all_but_the_first_token(
    r1_toy: PreTrainedTokenizerFast,
) -> None:
    row = r1(r1_toy, labels="everything").encode(THOUGHT)
    assert row.supervised == (False,) + (True,) * (len(row) - 1)
    assert row.input_ids == r1(r1_toy).encode(THOUGHT).input_ids


@given(HOSTILE_TEXT, HOSTILE_TEXT, HOSTILE_TEXT)
@settings(max_examples=40, deadline=None)
def test_the_prompt_is_how_the_row_begins_and_the_answer_is_the_rest(
    r1_toy: PreTrainedTokenizerFast, question: str, reasoning: str, answer: str
) -> None:
    first = talk(
        ("user", question),
        ("assistant", answer, reasoning),
        ("user", question),
        ("assistant", answer, reasoning),
    )
    for labels in ("response", "everything"):
        template = r1(r1_toy, labels=labels)
        row, prompt = template.encode(first), template.prompt_ids(first)
        assert list(row.input_ids[: len(prompt)]) == prompt
        if labels == "response":
            assert len(row) - len(prompt) == len(spans(row)[-1])
        assert template.prompt_ids(Example("", first.turns[:-1])) == prompt


@pytest.mark.parametrize(
    ("examples", "prompt", "with_thought", "without"),
    [
        ((THOUGHT,), f"{ASSISTANT}{THINK}\n", f"{REASONING}\n{END_THINK}\n\n{ANSWER}{EOS}", None),
        ((UNTHOUGHT,), ASSISTANT, None, f"{ANSWER}{EOS}"),
        (
            (THOUGHT, UNTHOUGHT),
            ASSISTANT,
            f"{THINK}\n{REASONING}\n{END_THINK}\n\n{ANSWER}{EOS}",
            f"{ANSWER}{EOS}",
        ),
    ],
    ids=["all think", "none thinks", "some think"],
)
def test_the_prompt_opens_the_think_block_only_if_every_answer_has_reasoning(
    r1_toy: PreTrainedTokenizerFast,
    examples: tuple[Example, ...],
    prompt: str,
    with_thought: str | None,
    without: str | None,
) -> None:
    template = r1(r1_toy, examples)
    for conversation, answer in ((THOUGHT, with_thought), (UNTHOUGHT, without)):
        if answer is not None:
            assert (
                r1_toy.decode(template.prompt_ids(conversation)) == BOS + USER + QUESTION + prompt
            )
            assert [r1_toy.decode(span) for span in spans(template.encode(conversation))] == [
                answer
            ]


def test_a_turn_without_reasoning_behind_an_open_think_tag_is_refused(
    r1_toy: PreTrainedTokenizerFast,
) -> None:
    with pytest.raises(ValueError, match="row train:0: an assistant turn has no reasoning"):
        r1(r1_toy, (THOUGHT,)).encode(UNTHOUGHT)


# The saved template


@given(PLAIN_TEXT, PLAIN_TEXT, WORDS, WORDS)
@settings(max_examples=40, deadline=None)
def test_the_saved_r1_template_gives_the_ids_of_the_training_prompt(
    r1_toy: PreTrainedTokenizerFast, system: str, question: str, reasoning: str, answer: str
) -> None:
    conversation = talk(
        ("system", system),
        ("user", question),
        ("assistant", answer, reasoning),
        ("user", question),
        ("assistant", answer, reasoning),
    )
    for examples in ((THOUGHT,), (THOUGHT, UNTHOUGHT)):
        template = r1(r1_toy, examples)
        assert saved_prompt(r1_toy, template, conversation) == template.prompt_ids(conversation)


def test_the_saved_r1_template_writes_a_whole_conversation_with_its_reasoning(
    r1_toy: PreTrainedTokenizerFast,
) -> None:
    template = r1(r1_toy, (TWO,))
    text = r1_toy.apply_chat_template(
        template.messages(TWO), chat_template=template.chat_template, tokenize=False
    )
    assert text == r1_toy.decode(template.encode(TWO).input_ids)


@pytest.mark.parametrize("name", ["r1", "instruct"])
def test_a_saved_template_that_would_not_give_the_training_prompt_is_found_out(
    r1_toy: PreTrainedTokenizerFast, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        templates, f"{name}_source", lambda *_: "{{ bos_token }}{{ messages[0]['content'] }}"
    )
    with pytest.raises(ValueError, match="generation would not get the tokens of training"):
        make_template(DataConfig(template=name), r1_toy, (THOUGHT,))  # type: ignore[arg-type]


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
