"""Label shift, lengths, and tokenizers that do not serve."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from toys import BOS, EOS, MARKS, UNTHOUGHT, chatml, toy
from transformers import PreTrainedTokenizerFast

from glassloop.config import DataConfig
from glassloop.data.rows import IGNORE, Row
from glassloop.data.templates import fit, make_template, targets
from glassloop.data.tokens import make_codec

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
