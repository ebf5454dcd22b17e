"""Templates r1 and instruct, labels and lengths, on a toy tokenizer."""

from __future__ import annotations

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
)
from transformers import PreTrainedTokenizerFast

from glassloop.config import DataConfig
from glassloop.data import templates
from glassloop.data.rows import Example
from glassloop.data.templates import make_template, targets

pytestmark = pytest.mark.usefixtures("one_codec_a_tokenizer")

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
@example(*("".join(HOSTILE),) * 3)
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
