"""Rows kept, dropped and cut, and the numbers that are printed of them."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from glassloop.config.config import DataConfig
from glassloop.data.dataset import Dataset, build_rows, quantiles, summary
from glassloop.data.rows import Example, Turn
from glassloop.data.sources import Loaded
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
        repeated=3,
        heldout_repeated=0,
        exact_across=1,
        near_across=(("train:5", "test:7"),),
        labels={"honest": 2, "scam": 1},
        heldout_labels={"honest": 1} if heldout else {},
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
        "chat; 0 of 4 assistant turns have reasoning",
        "2 rows kept, 1 dropped, 0 cut at 60 tokens",
        f"max {dataset.train.untouched_tokens[-1]}",
        f"{dataset.train.supervised_tokens} of {dataset.train.tokens} tokens supervised",
        "3 exact within training, 0 exact within held-out",
        "1 exact across (left out of training), 1 near across; train:5 ~ test:7",
        "training: 2 honest, 1 scam; held-out: 1 honest",
    ):
        assert part in text
    alone, config = build(tiny_tokenizer, [example(0, 2)], [], shuffle=False)
    assert "across" not in "\n".join(summary(alone, config))
    assert "in the source's order" in summary(alone, config)[0]
