"""What becomes of a conversation's text, marks and labels. A toy tokenizer with R1's marks, so that it runs everywhere."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from glassloop.config.config import DataConfig
from glassloop.data import chat_template, templates
from glassloop.data.rows import IGNORE, Example, Row, Turn
from glassloop.data.templates import (
    INSTRUCTION,
    PREAMBLE,
    THINK_FIRST,
    Template,
    fit,
    make_template,
    targets,
)
from glassloop.data.tokens import make_codec

BOS, EOS, USER, ASSISTANT, THINK, END_THINK = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
)
MARKS = (BOS, EOS, USER, ASSISTANT, THINK, END_THINK)
HOSTILE = [
    *MARKS,
    "<think>\n\n</think>",
    "\0",
    "🧨👩‍👩‍👧",
    "ﷺ" * 50,
    "\u202e",
    " \n\t ",
    "\ue0000c\ue001",
    "{{ bos_token }}",
    "### Response:",
    "a" * 50_000,
]
HOSTILE_TEXT = st.lists(st.sampled_from(HOSTILE) | st.text(max_size=8), max_size=5).map("".join)
PLAIN_TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="<>｜"), max_size=40
)
WORDS = st.lists(st.sampled_from(["spider", "legs", "12", "é", "ok."]), min_size=1, max_size=5).map(
    " ".join
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
QUESTION, REASONING, ANSWER = "How many legs has a spider?", "It is an arachnid.", "Eight."


def toy(
    marks: Sequence[str], *, bos: str | None, eos: str | None, template: str | None = None
) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose `marks` are added tokens that do not count as special, as R1's are; pad is EOS, as R1's is."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(
        [QUESTION, REASONING, ANSWER, "<think> </think> assistant user system"] * 4, trainer
    )
    tokenizer.add_tokens(
        [AddedToken(mark, special=mark in (bos, eos), normalized=False) for mark in marks]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos
    )
    fast.chat_template = template  # type: ignore[assignment]
    return fast


def prefixing(how: str, space: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space before text, at the start of a row ("first") or behind each mark; `space` stands before answers."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=True)
    scheme = how if how in ("first", "always") else "always"
    tokenizer.pre_tokenizer = (
        byte_level if how == "bytes" else pre_tokenizers.Metaspace(prepend_scheme=scheme)
    )  # type: ignore[arg-type]
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(
        [QUESTION, REASONING, ANSWER, "[INST] [/INST] And a bee? Be brief. It has eight.\n<think>/"]
        * 4,
        trainer,
    )
    if how == "bytes":
        tokenizer.pre_tokenizer = byte_level
    elif how == "prepend":
        tokenizer.pre_tokenizer = None  # type: ignore[assignment]
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = LLAMA2.replace("{{ ' ' +", "{{ '" + space + "' +")
    return fast


@pytest.fixture(scope="module", autouse=True)
def _one_codec_a_tokenizer() -> Iterator[None]:
    """Templates of one tokenizer share what is made of it, to save time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(templates, "make_codec", functools.cache(make_codec))
        yield


@pytest.fixture(scope="module")
def r1_toy() -> PreTrainedTokenizerFast:
    return toy(MARKS, bos=BOS, eos=EOS)


@pytest.fixture(scope="module")
def chatml_template() -> tuple[PreTrainedTokenizerFast, Template]:
    tokenizer = chatml()
    return tokenizer, make_template(DataConfig(template="chat"), tokenizer, (UNTHOUGHT,))


def chatml(template: str = CHATML) -> PreTrainedTokenizerFast:
    return toy(
        ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        bos=None,
        eos="<|im_end|>",
        template=template,
    )


def talk(*turns: tuple[str, str] | tuple[str, str, str | None]) -> Example:
    return Example("train:0", tuple(Turn(*turn) for turn in turns))


THOUGHT = talk(("user", QUESTION), ("assistant", ANSWER, REASONING))
UNTHOUGHT = talk(("user", QUESTION), ("assistant", ANSWER))
TWO = talk(
    ("user", QUESTION),
    ("assistant", ANSWER, REASONING),
    ("user", "And a bee?"),
    ("assistant", "Six.", "It is an insect."),
)


def r1(
    tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example] = (THOUGHT,), **data: object
) -> Template:
    return make_template(DataConfig(template="r1", **data), tokenizer, examples)  # type: ignore[arg-type]


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def mark(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    token = tokenizer.convert_tokens_to_ids(text)
    assert isinstance(token, int)
    return token


def marks_in(tokenizer: PreTrainedTokenizerFast, row: Row) -> list[str]:
    names = {token: text for text, token in tokenizer.get_added_vocab().items()}
    return [names[token] for token in row.input_ids if token in names]


def spans(row: Row) -> list[tuple[int, ...]]:
    """Ids of each unbroken supervised stretch."""
    found: list[list[int]] = []
    for place, (token, flag) in enumerate(zip(row.input_ids, row.supervised, strict=True)):
        if flag and not row.supervised[place - 1]:
            found.append([])
        if flag:
            found[-1].append(token)
    return [tuple(span) for span in found]


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


def saved_prompt(
    tokenizer: PreTrainedTokenizerFast, template: Template, conversation: Example
) -> list[int]:
    return tokenizer.apply_chat_template(
        template.messages(conversation)[:-1],
        chat_template=template.chat_template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )  # type: ignore[return-value]


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
        templates, f"_{name}_source", lambda *_: "{{ bos_token }}{{ messages[0]['content'] }}"
    )
    with pytest.raises(ValueError, match="generation would not get the tokens of training"):
        make_template(DataConfig(template=name), r1_toy, (THOUGHT,))  # type: ignore[arg-type]


# instruct


@pytest.mark.parametrize(("examples", "think"), [((THOUGHT,), True), ((UNTHOUGHT,), False)])
def test_an_instruct_row_is_the_recipes_text_form(
    r1_toy: PreTrainedTokenizerFast, examples: tuple[Example, ...], think: bool
) -> None:
    template = make_template(DataConfig(template="instruct"), r1_toy, examples)
    head = f"{BOS}{PREAMBLE}{THINK_FIRST if think else ''}\n\n### Instruction:\n{INSTRUCTION}\n\n### Question:\n{QUESTION}\n\n### Response:\n"
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
        make_template(DataConfig(template="instruct"), r1_toy, (TWO,))


# chat


def test_chat_writes_what_the_tokenizers_template_writes_and_learns_each_answer_with_its_end_token() -> (
    None
):
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


def test_an_end_of_turn_that_is_not_the_tokenizers_end_token_is_learned_and_stops_generation() -> (
    None
):
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
    "('<think>\n' + m['reasoning_content'] | default('') + '\n</think>\n\n' if m['role'] == 'assistant' else '') + m['content']",
)
OPENS_THINK = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")


@pytest.mark.parametrize(
    ("source", "conversation", "message"),
    [
        (DROPS_THOUGHT, THOUGHT, "drops or doubles reasoning; set data.template=r1 or instruct"),
        (DOUBLES, THOUGHT, "drops or doubles reasoning; set data.template=r1 or instruct"),
        (
            DROPS_EARLIER_THOUGHT,
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
        "drops earlier reasoning",
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


def test_a_template_that_drops_earlier_reasoning_serves_rows_of_one_answer() -> None:
    tokenizer = chatml(DROPS_EARLIER_THOUGHT)
    template = make_template(DataConfig(template="chat"), tokenizer, (THOUGHT,))
    assert [tokenizer.decode(span) for span in spans(template.encode(THOUGHT))] == [
        f"<think>\n{REASONING}\n</think>\n\n{ANSWER}<|im_end|>"
    ]


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


# Shift and length


def test_the_label_of_a_place_is_the_supervised_token_behind_it() -> None:
    row = Row("train:0", (1, 5, 6, 7, 2), (False, False, True, False, True))
    assert targets(row) == [IGNORE, 6, IGNORE, 2, IGNORE]


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=12))
def test_the_label_shift_keeps_every_supervised_token_once(tokens: list[tuple[int, bool]]) -> None:
    supervised = (False, *(flag for _, flag in tokens[1:]))
    row = Row("train:0", tuple(token for token, _ in tokens), supervised)
    labels = targets(row)
    assert len(labels) == len(row)
    assert [label for label in labels if label != IGNORE] == [
        token for token, flag in zip(row.input_ids, supervised, strict=True) if flag
    ]


def test_a_long_row_is_dropped_or_cut_and_a_cut_row_lacks_its_end_token() -> None:
    row = Row("train:0", (1, 5, 6, 7, 2), (False, False, True, True, True))
    assert fit(row, 5, "drop") is row
    assert fit(row, 5, "cut") is row
    assert fit(row, 4, "drop") is None
    assert fit(row, 4, "cut") == Row(
        "train:0", (1, 5, 6, 7), (False, False, True, True), truncated=True
    )


def test_a_row_whose_answer_would_be_cut_away_whole_is_left_out() -> None:
    assert fit(Row("train:0", (1, 5, 6, 7, 2), (False, False, True, True, True)), 2, "cut") is None


# Tokenizers that do not serve


@pytest.mark.parametrize(
    ("tokenizer", "template", "message"),
    [
        (
            lambda: chatml(),
            "r1",
            r"has no token <｜User｜>, <｜Assistant｜>, <think>, </think>; set data\.template=chat",
        ),
        (
            lambda: toy(MARKS, bos=None, eos=EOS),
            "r1",
            r"has no token to begin with; set data\.template=chat",
        ),
        (lambda: toy(MARKS, bos=BOS, eos=None), "r1", "has no end token"),
        (
            lambda: toy(MARKS, bos=BOS, eos=EOS),
            "chat",
            r"has no chat template; set data\.template=instruct",
        ),
    ],
    ids=["no marks", "no BOS", "no EOS", "no chat template"],
)
def test_a_tokenizer_that_lacks_what_a_template_needs_is_refused(
    tokenizer, template: str, message: str
) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make_template(DataConfig(template=template), tokenizer(), (UNTHOUGHT,))  # type: ignore[arg-type]


def test_a_tokenizer_whose_model_turns_text_into_control_tokens_is_refused() -> None:
    words = Tokenizer(
        models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "hi": 3}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    with pytest.raises(ValueError, match="turns the plain text '<s>' into control token 1"):
        make_template(DataConfig(template="instruct"), fast, (UNTHOUGHT,))


def test_tokens_of_mere_whitespace_stay_text() -> None:
    tokenizer = toy(("    ", *MARKS), bos=BOS, eos=EOS)
    codec = make_codec(tokenizer)
    assert codec.opening.encode("a    b").tokens[1] == "    "
    assert set(codec.control) == set(MARKS)


def test_whitespace_tokens_that_are_numbered_behind_control_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="whitespace tokens"):
        make_codec(toy((*MARKS, "    "), bos=BOS, eos=EOS))
