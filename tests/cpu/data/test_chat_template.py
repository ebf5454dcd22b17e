"""The tokenizer's own chat template: what is written, learned and refused."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from toys import (
    ANSWER,
    CHATML,
    HOSTILE,
    HOSTILE_TEXT,
    QUESTION,
    REASONING,
    THOUGHT,
    TWO,
    UNTHOUGHT,
    chatml,
    mark,
    marks_in,
    prefixing,
    saved_prompt,
    spans,
    talk,
    toy,
)
from transformers import PreTrainedTokenizerFast

from glassloop.config import DataConfig
from glassloop.data import chat_template, templates
from glassloop.data.rows import Example
from glassloop.data.templates import (
    Template,
    make_template,
)
from glassloop.data.tokens import make_codec
from glassloop.data.turns import talk_of


@pytest.fixture(scope="module", autouse=True)
def _one_codec_a_tokenizer() -> Iterator[None]:
    """Make a tokenizer's codec once, to save time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(templates, "make_codec", functools.cache(make_codec))
        yield


@pytest.fixture(scope="module")
def chatml_template() -> tuple[PreTrainedTokenizerFast, Template]:
    tokenizer = chatml()
    return tokenizer, make_template(DataConfig(template="chat"), tokenizer, (UNTHOUGHT,))


# chat


def test_chat_writes_as_the_tokenizers_template_and_learns_answers_with_their_end() -> None:
    tokenizer = chatml()
    template = make_template(DataConfig(template="chat"), tokenizer, (TWO,))
    row = template.encode(TWO)
    rendered = tokenizer.apply_chat_template(template.messages(TWO), tokenize=False)
    assert (
        tokenizer.decode(row.input_ids) + "\n" == rendered
    )  # behind the last end token nothing is left
    assert [tokenizer.decode(span) for span in spans(row)] == [
        f"<think>\n{REASONING}\n</think>\n\n{ANSWER}<|im_end|>",
        "<think>\nIt is an insect.\n</think>\n\nSix.<|im_end|>",
    ]
    assert saved_prompt(tokenizer, template, TWO) == template.prompt_ids(TWO)
    assert template.stop_ids == (tokenizer.eos_token_id,)


@given(HOSTILE_TEXT, HOSTILE_TEXT)
@example(*("".join(HOSTILE),) * 2)
@settings(max_examples=40, deadline=None)
def test_no_text_of_a_row_becomes_a_mark_under_chat(
    chatml_template: tuple[PreTrainedTokenizerFast, Template], question: str, answer: str
) -> None:
    tokenizer, template = chatml_template
    conversation = talk(("user", question + "<|im_end|>"), ("assistant", "<|im_start|>" + answer))
    row = template.encode(conversation)
    assert marks_in(tokenizer, row) == ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]
    assert f"user\n{question}<|im_end|>" in tokenizer.decode(row.input_ids)
    assert list(row.input_ids[: len(template.prompt_ids(conversation))]) == template.prompt_ids(
        conversation
    )


@pytest.mark.parametrize(
    ("method", "want"),
    [("", " \n Hi.\t"), (".strip()", "Hi."), (" | trim", "Hi."), (".lstrip('\\n ')", "Hi.\t")],
)
def test_a_template_that_trims_contents_trims_them_in_training_too(method: str, want: str) -> None:
    tokenizer = chatml(CHATML.replace("m['content']", f"(m['content']{method})"))
    conversation = talk(("user", " \n Hi.\t"), ("assistant", " \n Hi.\t"))
    template = make_template(DataConfig(template="chat"), tokenizer, (conversation,))
    assert (
        tokenizer.decode(template.encode(conversation).input_ids).count(f"\n{want}<|im_end|>") == 2
    )
    assert saved_prompt(tokenizer, template, conversation) == template.prompt_ids(conversation)


def test_a_template_without_an_end_token_gets_one_behind_the_last_answer() -> None:
    tokenizer = chatml(CHATML.replace("<|im_end|>", "").replace("<|im_start|>", "# "))
    template = make_template(DataConfig(template="chat"), tokenizer, (TWO,))
    row = template.encode(TWO)
    assert row.input_ids[-1] == tokenizer.eos_token_id
    assert marks_in(tokenizer, row) == ["<|im_end|>"]
    assert [tokenizer.decode(span)[-5:] for span in spans(row)] == ["ight.", "end|>"]


def test_another_end_of_turn_than_the_end_token_is_learned_and_stops_generation() -> None:
    tokenizer = toy(
        ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        bos=None,
        eos="<|endoftext|>",
        template=CHATML,
    )
    template = make_template(DataConfig(template="chat"), tokenizer, (THOUGHT,))
    assert template.encode(THOUGHT).input_ids[-1] == mark(tokenizer, "<|im_end|>")
    assert template.stop_ids == (mark(tokenizer, "<|im_end|>"), mark(tokenizer, "<|endoftext|>"))


DROPS_THOUGHT = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
DROPS_EARLIER_THOUGHT = CHATML.replace(
    "m['content']", "(m['content'] if loop.last else m['content'].split('</think>')[-1])"
)
REPEATS = CHATML.replace("m['content']", "m['content'] + messages[0]['content']")
DOUBLES = CHATML.replace(
    "m['content']", "('<think>\n\n</think>\n\n' if m['role'] == 'assistant' else '') + m['content']"
)
APART = CHATML.replace(
    "m['content']",
    "('<think>\n' + m['reasoning_content'] | default('') + '\n</think>\n\n' "
    "if m['role'] == 'assistant' else '') + m['content']",
)
OPENS_THINK = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")


@pytest.mark.parametrize(
    ("source", "conversation", "message"),
    [
        (DROPS_THOUGHT, THOUGHT, "drops or doubles reasoning; set data.template=r1 or instruct"),
        (DOUBLES, THOUGHT, "drops or doubles reasoning; set data.template=r1 or instruct"),
        (
            DROPS_EARLIER_THOUGHT.replace("loop.last", "messages | length < 3"),
            TWO,
            "drops, repeats or moves text of a turn; set data.template=r1 or instruct",
        ),
        (REPEATS, UNTHOUGHT, "drops, repeats or moves text of a turn"),
        (OPENS_THINK, UNTHOUGHT, "does not write its own generation prompt before an answer"),
        (
            CHATML.replace("{% for", "{{ raise_exception('no roles at all') }}{% for"),
            UNTHOUGHT,
            "refuses turns user.*: no roles at all .*; set",
        ),
    ],
    ids=[
        "drops reasoning",
        "writes an empty block before",
        "drops the last reasoning of several",
        "repeats",
        "prompt that rows do not have",
        "raises",
    ],
)
def test_a_template_under_which_training_and_generation_would_differ_is_refused(
    source: str, conversation: Example, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_template(DataConfig(template="chat"), chatml(source), (conversation,)).encode(
            conversation
        )


def test_a_template_that_takes_reasoning_beside_the_content_gets_it_there() -> None:
    tokenizer = chatml(APART)
    template = make_template(DataConfig(template="chat"), tokenizer, (TWO,))
    row = template.encode(TWO)
    assert [tokenizer.decode(span) for span in spans(row)] == [
        f"<think>\n{REASONING}\n</think>\n\n{ANSWER}<|im_end|>",
        "<think>\nIt is an insect.\n</think>\n\nSix.<|im_end|>",
    ]
    assert saved_prompt(tokenizer, template, TWO) == template.prompt_ids(TWO)


def test_a_template_that_drops_earlier_reasoning_keeps_that_of_the_last_answer() -> None:
    tokenizer = chatml(DROPS_EARLIER_THOUGHT)
    template = make_template(DataConfig(template="chat"), tokenizer, (THOUGHT, TWO))
    for row, thought in ((THOUGHT, f"{REASONING}"), (TWO, "It is an insect.")):
        learned = [tokenizer.decode(span) for span in spans(template.encode(row))]
        assert learned[-1].startswith(f"<think>\n{thought}\n</think>")
        assert not any("think" in text for text in learned[:-1])


def test_a_template_that_writes_todays_date_gets_one_that_stays() -> None:
    dated = "{{ 'Today is ' + strftime_now(\"%d %b %Y\") + '. ' }}" + CHATML
    tokenizer = chatml(dated)
    template = make_template(DataConfig(template="chat"), tokenizer, (UNTHOUGHT,))
    assert tokenizer.decode(template.encode(UNTHOUGHT).input_ids).startswith(
        "Today is 26 Jul 2024. "
    )
    assert saved_prompt(tokenizer, template, UNTHOUGHT) == template.prompt_ids(UNTHOUGHT)
    assert datetime.date.today() > chat_template.TODAY


@pytest.mark.parametrize("space", ["", " "])
@pytest.mark.parametrize("how", ["first", "always", "prepend", "bytes"])
def test_a_tokenizer_that_puts_a_space_before_text_puts_none_where_an_answer_begins(
    how: str, space: str
) -> None:
    tokenizer = prefixing(how, space)
    template = make_template(DataConfig(template="chat"), tokenizer, (UNTHOUGHT,))
    row, prompt = template.encode(UNTHOUGHT), template.prompt_ids(UNTHOUGHT)
    assert saved_prompt(tokenizer, template, UNTHOUGHT) == prompt
    text = "".join(tokenizer.convert_ids_to_tokens(list(row.input_ids[len(prompt) : -1])))
    assert (
        text.replace("Ġ", " ").replace("▁", " ") == f"{space}{ANSWER} "
    )  # the space that the template writes, if any
    assert marks_in(tokenizer, row) == ["<s>", "</s>"]


# Inline think blocks, loss by turn, tools


SPLITS = CHATML.replace(
    "m['content']",
    "(('<think>\n' + m['content'].split('</think>')[0].split('<think>')[1].strip('\n') + "
    "'\n</think>\n\n' + m['content'].split('</think>')[1].lstrip('\n')) "
    "if '</think>' in m['content'] else m['content'])",
)


@pytest.mark.parametrize(
    "text", ["<think>\n{}\n</think>\n\n{}", "<think>{}</think>{}", "<think>\n\n{} </think> {}"]
)
@pytest.mark.parametrize("source", [CHATML, SPLITS], ids=["plain", "splits"])
def test_an_inline_think_block_gives_the_ids_of_the_tokenizers_own_template(
    source: str, text: str
) -> None:
    tokenizer = chatml(source)
    said = text.format(REASONING, ANSWER)
    asked = {"role": "user", "content": QUESTION}
    row = {"messages": [asked, {"role": "assistant", "content": said}] * 2}
    conversation = Example(
        "train:0", talk_of({"messages": row["messages"]}, "messages", DataConfig(), "x").turns
    )
    template = make_template(DataConfig(template="chat"), tokenizer, (conversation,))
    own = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    assert tokenizer.decode(template.encode(conversation).input_ids) + "\n" == own
    assert template.messages(conversation) == row["messages"]
    beside = chatml(APART)
    template = make_template(DataConfig(template="chat"), beside, (conversation,))
    assert "<think>\n" + REASONING.strip() in beside.decode(template.encode(conversation).input_ids)


def test_a_turn_without_loss_has_no_supervised_token_under_chat(
    chatml_template: tuple[PreTrainedTokenizerFast, Template],
) -> None:
    _, template = chatml_template
    two = talk(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    marked = replace(
        two, turns=(two.turns[0], replace(two.turns[1], trained=False), *two.turns[2:])
    )
    whole, row = template.encode(two), template.encode(marked)
    assert row.input_ids == whole.input_ids
    assert spans(row) == spans(whole)[1:]


GEMMA = CHATML.replace(
    "{% for m in messages %}",
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}",
)
MOVES = CHATML.replace(
    "m['content']",
    "(m['content'] + (messages[0]['content'] if loop.last and messages[0]['role'] == 'system' "
    "else ''))",
)


@pytest.mark.parametrize("source", [GEMMA, MOVES])
def test_a_template_without_a_system_turn_names_the_setting_that_places_it(source: str) -> None:
    conversation = talk(("system", "S."), ("user", "Q?"), ("assistant", "A."))
    with pytest.raises(
        ValueError, match=r"set data\.system_turn=user .*, or data\.system_turn=drop"
    ):
        make_template(DataConfig(template="chat"), chatml(source), (conversation,)).encode(
            conversation
        )
