"""Rows kept, dropped and cut, and their printed numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerFast

from glassloop.config import DataConfig
from glassloop.data.dataset import Dataset, build_rows, quantiles, summary
from glassloop.data.rows import Example, Turn
from glassloop.data.sources import Loaded, MixedPart
from glassloop.data.templates import make_template


def example(number: int, words: int) -> Example:
    return Example(
        f"train:{number}",
        (Turn("user", "go on " * words), Turn("assistant", "yes")),
        "scam" if number % 2 else "honest",
    )


def loaded(train: list[Example], heldout: list[Example]) -> Loaded:
    return Loaded(
        train=tuple(train),
        heldout=tuple(heldout),
        source="calls.csv",
        heldout_source="other.csv" if heldout else None,
        format="scam",
        total=1280,
        heldout_total=320,
        skipped={"empty response": 2},
        heldout_skipped={},
        exact_across=1,
        notes=("columns read: dialogue=text; not read: columns id",),
    )


def build(
    tokenizer: PreTrainedTokenizerFast, train: list[Example], heldout: list[Example], **data: object
) -> tuple[Dataset, DataConfig]:
    config = DataConfig(template="chat", **data)  # type: ignore[arg-type]
    template = make_template(config, tokenizer, (*train, *heldout))
    return build_rows(loaded(train, heldout), template, config), config


def test_long_rows_are_dropped_with_their_examples_and_the_others_keep_their_order(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    examples = [example(0, 2), example(1, 90), example(2, 3)]
    dataset, _ = build(tiny_tokenizer, examples, [example(3, 90), example(4, 1)], max_tokens=60)
    assert [row.row_id for row in dataset.train.rows] == ["train:0", "train:2"]
    assert dataset.train.examples == (examples[0], examples[2])
    assert dataset.train.dropped == ("train:1",)
    assert dataset.heldout.dropped == ("train:3",)
    assert dataset.train.cut == 0
    assert max(map(len, dataset.train.rows)) <= 60 < max(dataset.train.untouched_tokens)
    assert dataset.train.tokens == sum(len(row) for row in dataset.train.rows)
    assert dataset.train.supervised_tokens == sum(
        row.supervised_tokens for row in dataset.train.rows
    )


def test_cut_rows_are_kept_at_the_limit_and_counted(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    dataset, _ = build(
        tiny_tokenizer,
        [example(0, 2), example(1, 90)],
        [],
        max_tokens=60,
        too_long="cut",
        labels="everything",
    )
    assert dataset.train.cut == 1
    assert dataset.train.dropped == ()
    assert [len(row) for row in dataset.train.rows if row.truncated] == [60]


@pytest.mark.parametrize(
    ("train", "heldout", "what"),
    [([90], [], "all 1 training rows"), ([1], [90, 91], "all 2 held-out rows")],
)
def test_a_side_without_a_row_that_fits_is_refused(
    tiny_tokenizer: PreTrainedTokenizerFast, train: list[int], heldout: list[int], what: str
) -> None:
    with pytest.raises(
        ValueError,
        match=rf"data\.max_tokens = 60: {what} are longer \(the shortest has \d+ tokens\)",
    ):
        build(
            tiny_tokenizer,
            [example(0, words) for words in train],
            [example(1, words) for words in heldout],
            max_tokens=60,
        )


def test_a_row_is_the_same_alone_and_among_others(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [example(number, number) for number in range(1, 9)]
    dataset, config = build(tiny_tokenizer, examples, [])
    template = make_template(config, tiny_tokenizer, examples)
    assert dataset.train.rows == tuple(template.encode(one) for one in examples)


def test_quantiles_are_values_that_occur() -> None:
    assert quantiles(range(1, 101)) == {
        0.0: 1,
        0.25: 25,
        0.5: 50,
        0.75: 75,
        0.9: 90,
        0.99: 99,
        1.0: 100,
    }
    assert quantiles([7]) == dict.fromkeys((0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0), 7)
    assert quantiles([]) == {}


def test_the_summary_says_what_was_taken_left_out_and_cut(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    dataset, config = build(
        tiny_tokenizer,
        [example(0, 2), example(1, 90), example(2, 3)],
        [example(4, 1)],
        max_tokens=60,
    )
    text = "\n".join(summary(dataset, config))
    for part in (
        "calls.csv, format scam: took 3 of 1,280 rows, shuffled by seed; skipped 2 empty response",
        "other.csv: took 1 of 320 rows",
        "columns read: dialogue=text; not read: columns id",
        "chat; 0 of 3 assistant turns have reasoning",
        "2 rows kept, 1 dropped, 0 cut at 60 tokens",
        f"max {dataset.train.untouched_tokens[-1]}",
        f"{dataset.train.supervised_tokens} of {dataset.train.tokens} tokens supervised",
        "0 exact within training, 0 exact within held-out",
        "1 exact across (left out of training), ",
        "training: 2 honest; held-out: 1 honest",
    ):
        assert part in text
    alone, config = build(tiny_tokenizer, [example(0, 2)], [], shuffle=False)
    assert "across" not in "\n".join(summary(alone, config))
    assert "in the source's order" in summary(alone, config)[0]


def test_everything_that_is_counted_is_counted_of_rows_that_are_kept(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = [example(0, 2), example(2, 2), example(1, 90), example(3, 90)]  # scams are long
    dataset, config = build(tiny_tokenizer, rows, [example(4, 2), example(5, 90)], max_tokens=60)
    text = "\n".join(summary(dataset, config))
    assert "training: 2 honest; held-out: 1 honest" in text
    assert (dataset.repeated, dataset.heldout_repeated) == (1, 0)
    assert "0 of 3 assistant turns have reasoning" in text
    cut, config = build(tiny_tokenizer, rows, [], max_tokens=60, too_long="cut")
    assert "training: 2 honest" in "\n".join(
        summary(cut, config)
    )  # no answer is left of the others


def test_rows_that_the_template_cannot_write_are_refused_with_their_number_or_left_out(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    calls = '{"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}'
    turns = (Turn("user", "go on"), Turn("assistant", "", extra=calls))
    rows = [example(0, 2), Example("train:1", turns), Example("train:2", turns)]
    match = (
        r"row train:1: .*writes no tool calls.*\. 2 of 3 rows cannot train \(2 tool calls\): "
        r"correct them, or leave them out with data\.on_bad_row=skip"
    )
    with pytest.raises(ValueError, match=match):
        build(tiny_tokenizer, rows, [])
    dataset, config = build(tiny_tokenizer, rows, [], on_bad_row="skip")
    assert [row.row_id for row in dataset.train.rows] == ["train:0"]
    assert "1 rows kept, 0 dropped" in "\n".join(summary(dataset, config))
    assert "left out 2 tool calls" in "\n".join(summary(dataset, config))
    with pytest.raises(
        ValueError, match=r"none of 2 training rows can be written \(2 tool calls\)"
    ):
        build(tiny_tokenizer, rows[1:], [], on_bad_row="skip")


def test_control_tokens_that_rows_spell_are_named_with_the_setting_for_answers(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = [
        Example("train:0", (Turn("user", "go <pad>"), Turn("assistant", "a <|user|>"))),
        Example("train:1", (Turn("user", "on"), Turn("assistant", "b"))),
    ]
    dataset, config = build(tiny_tokenizer, rows, [])
    text = "\n".join(summary(dataset, config))
    assert "1 rows spell control tokens (" in text
    assert "which stay text; data.answer_tokens='<|user|>' lets answers use them" in text
    dataset, config = build(tiny_tokenizer, rows, [], answer_tokens=("<|user|>",))
    text = "\n".join(summary(dataset, config))
    assert "1 rows spell control tokens (<pad>), which stay text" in text
    assert "lets answers" not in text


def test_tools_that_the_template_does_not_list_are_said(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    offered = Example("train:0", example(0, 1).turns, tools='[{"name": "f"}]')
    dataset, config = build(tiny_tokenizer, [offered], [])
    assert "the tools of 1 rows are not written: it lists no tools" in "\n".join(
        summary(dataset, config)
    )


def test_the_parts_of_a_mix_are_counted(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    config = DataConfig(template="chat")
    rows = [example(0, 1), example(2, 1)]
    template = make_template(config, tiny_tokenizer, rows)
    mixed = (MixedPart("a.csv", 2.0, 2, "1/"),)
    built = build_rows(replace(loaded(rows, []), mixed=mixed), template, config)
    assert "mix          a.csv: 2 rows an epoch (weight 2)" in summary(built, config)
