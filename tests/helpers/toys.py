"""Toy tokenizers of several families, conversations, and questions to rows."""

from __future__ import annotations

from collections.abc import Sequence

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

from glassloop.config import DataConfig
from glassloop.data.rows import Example, Row, Turn
from glassloop.data.templates import Template, make_template

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
# Each of them, the long word too, is in every test's example; drawn texts have a shorter one.
DRAWN = [text if len(text) < 1000 else "a" * 1000 for text in HOSTILE]
HOSTILE_TEXT = st.lists(st.sampled_from(DRAWN) | st.text(max_size=8), max_size=5).map("".join)
PLAIN_TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="<>｜"), max_size=40
)
WORDS = st.lists(st.sampled_from(["spider", "legs", "12", "é", "ok."]), min_size=1, max_size=5).map(
    " ".join
)
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
QUESTION, REASONING, ANSWER = "How many legs has a spider?", "It is an arachnid.", "Eight."


def toy(
    marks: Sequence[str], *, bos: str | None, eos: str | None, template: str | None = None
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `marks` that are not special, as R1's are."""
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
    """A tokenizer that puts a space before text.

    At the start of a row ("first") or behind each mark; `space` stands before answers.
    """
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
