"""Rows of a source that are taken, held out, dropped and mixed."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
from row_files import ids, load, pairs, refused, write

from glassloop.config import DataConfig
from glassloop.data import duplicates, opening
from glassloop.data.duplicates import HeldoutRuns, asked, key, repeated
from glassloop.data.rows import Example, Turn
from glassloop.data.scam import SCAM_QUESTION
from glassloop.data.sources import load_examples
from glassloop.data.taking import order

SHARED = Path(__file__).parents[4] / "shared" / "data"


def test_the_sample_loads_and_its_absence_says_where_it_lies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded = load_examples(DataConfig(source="sample", heldout=0.25), 3407)
    assert loaded.format == "scam"
    assert len(loaded.train) + len(loaded.heldout) >= 64
    assert all(example.turns[-1].reasoning for example in loaded.train)
    monkeypatch.setattr(opening, "SAMPLE", tmp_path / "calls.jsonl")
    with pytest.raises(ValueError, match="is missing; the sample lies in a checkout"):
        load_examples(DataConfig(source="sample"), 0)


# Which rows


def test_rows_are_shuffled_by_seed_before_they_are_taken(tmp_path: Path) -> None:
    rows = pairs(50)
    first, again, other = (
        ids(load(tmp_path, rows, rows=10, seed=seed).train) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert first != [f"train:{number}" for number in range(10)]
    assert len(set(first)) == 10
    assert ids(load(tmp_path, rows, rows=10, shuffle=False).train) == [
        f"train:{number}" for number in range(10)
    ]


def test_the_order_is_the_same_for_all_versions() -> None:
    assert order(range(8), 3407, "rows") == [0, 3, 1, 5, 7, 2, 6, 4]


def test_a_row_id_is_the_rows_place_in_its_source(tmp_path: Path) -> None:
    for example in load(tmp_path, pairs(20), rows=5).train:
        assert example.turns[0].content == f"Question {example.row_id.removeprefix('train:')}?"


@pytest.mark.parametrize("fraction", [0.2, "0.2"])
def test_a_heldout_fraction_is_drawn_by_seed_before_rows_are_taken(
    tmp_path: Path, fraction: float | str
) -> None:
    few, all_of_them = (
        load(tmp_path, pairs(50), heldout=fraction, rows=rows) for rows in (10, None)
    )
    assert ids(few.heldout) == ids(all_of_them.heldout)
    assert len(few.heldout) == 10
    assert ids(all_of_them.train)[:10] == ids(few.train)
    assert (few.total, few.heldout_total) == (40, 10)
    assert not set(ids(few.heldout)) & set(ids(all_of_them.train))
    assert len(all_of_them.train) == 40
    assert set(ids(load(tmp_path, pairs(50), heldout=fraction, seed=1).heldout)) != set(
        ids(few.heldout)
    )


def test_heldout_rows_may_come_from_a_file_and_be_limited(tmp_path: Path) -> None:
    other = write(
        tmp_path / "other.csv",
        [{"prompt": f"Other {number}?", "completion": "No."} for number in range(9)],
    )
    loaded = load(tmp_path, pairs(5), heldout=other, heldout_rows=4)
    assert len(loaded.heldout) == 4
    assert all(row_id.startswith("heldout:") for row_id in ids(loaded.heldout))
    assert loaded.heldout_total == 9


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ({"rows": 6}, r"data\.rows = 6, but .* has only 5 usable rows of 5; set data\.rows=5"),
        (
            {"heldout": "test"},
            r"data\.heldout = test: data\.source = .* names files, which have no splits",
        ),
        ({"heldout": "train"}, r"data\.heldout = train is also data\.split"),
        ({"heldout": "1.5"}, "a fraction must lie between 0 and 1"),
        ({"heldout": 0.01}, r"data\.heldout = 0\.01 of 5 rows is 0"),
        ({"heldout": 0.99}, r"data\.heldout = 0\.99 of 5 rows is 5"),
        (
            {"heldout": 0.4, "heldout_rows": 3},
            r"data\.heldout_rows = 3, but .* has only 2 usable rows of 2",
        ),
        ({"heldout": "gone.csv"}, r"data\.heldout = gone\.csv: there is no such file"),
        ({"split": "test"}, r"data\.split = test: .* names files, which have no splits"),
    ],
)
def test_rows_that_are_not_there_are_refused(
    tmp_path: Path, data: dict[str, Any], match: str
) -> None:
    refused(tmp_path, pairs(5), match, **data)


# Duplicates


def test_exact_duplicates_across_are_refused_with_count_ids_and_cure(tmp_path: Path) -> None:
    other = write(
        tmp_path / "other.jsonl", [{"prompt": "  Question\n3?", "completion": "Another answer."}]
    )
    refused(
        tmp_path,
        pairs(5),
        r"1 of 5 training rows .*\(train:3 = heldout:0\).*set data\.heldout_duplicates=drop",
        heldout=other,
    )


def test_exact_duplicates_across_are_dropped_and_counted_if_asked(tmp_path: Path) -> None:
    other = write(
        tmp_path / "other.jsonl", [{"prompt": "Question 3?", "completion": "Another answer."}]
    )
    loaded = load(tmp_path, pairs(5), heldout=other, heldout_duplicates="drop", rows=4)
    assert sorted(ids(loaded.train)) == ["train:0", "train:1", "train:2", "train:4"]
    assert loaded.exact_across == 1
    assert loaded.skipped == {}


def test_repetitions_within_training_are_counted(tmp_path: Path) -> None:
    assert repeated(load(tmp_path, [*pairs(3), *pairs(2)]).train) == 2


def ask(row_id: str, text: str) -> Example:
    return Example(row_id, (Turn("user", SCAM_QUESTION + text), Turn("assistant", "Yes.")))


def test_near_duplicates_are_those_that_share_most_runs_of_three_words() -> None:
    words = [f"word{number}" for number in range(40)]
    heldout = [
        ask("test:0", " ".join(words)),
        ask("test:1", "quite another text with words of its own"),
    ]
    train = [
        ask("train:same", " ".join(words)),  # exact: counted elsewhere
        ask("train:near", " ".join(words).upper().replace("WORD7 ", "word, 7? ")),
        ask("train:far", " ".join(words[:20] + [f"new{number}" for number in range(20)])),
        ask("train:short", "hm"),
    ]
    assert HeldoutRuns(heldout).near(train) == [("train:near", "test:0")]


def brute_force(train: list[Example], heldout: list[Example]) -> list[tuple[str, str]]:
    """Every pair compared."""

    def runs(example: Example) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", asked(example).lower())
        return {tuple(words[start : start + 3]) for start in range(max(1, len(words) - 2))}

    pairs = []
    for example in train:
        own = runs(example)
        ranked = [
            (len(own & other) / len(own | other), place)
            for place, other in enumerate(map(runs, heldout))
        ]
        share, place = max(ranked, default=(0.0, 0))
        if share >= 0.7 and key(example) not in set(map(key, heldout)):
            pairs.append((example.row_id, heldout[place].row_id))
    return pairs


def test_near_duplicates_are_those_that_comparing_every_pair_finds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(duplicates, "BLOCK", 7)
    draw, found = random.Random(0), 0
    for _ in range(60):
        texts = [[draw.choice("abcd") for _ in range(draw.randint(0, 14))] for _ in range(8)]

        def near(name: str, number: int, texts: list[list[str]] = texts) -> Example:
            words = list(draw.choice(texts))
            for place in [draw.randrange(len(words)) for _ in range(draw.randint(0, 2)) if words]:
                words[place] = draw.choice("abcdef")
            return Example(f"{name}:{number}", (Turn("user", " ".join(words) or "x"),))

        train = [near("train", number) for number in range(draw.randint(0, 30))]
        heldout = [near("test", number) for number in range(draw.randint(0, 20))]
        expected = brute_force(train, heldout)
        assert HeldoutRuns(heldout).near(train) == expected
        found += len(expected)
    assert found > 10


def test_the_words_that_every_question_begins_with_make_no_near_duplicates() -> None:
    assert (
        HeldoutRuns([ask("test:0", "caller: goodbye")]).near([ask("train:0", "caller: hello")])
        == []
    )


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there")
def test_real_rows_load_balanced_with_their_near_duplicate_found() -> None:
    train, test = (str(SHARED / f"scam-dialogue_shaped_{name}.csv") for name in ("train", "test"))
    loaded = load_examples(DataConfig(source=train, heldout=test, rows=600), 3407)
    assert (len(loaded.train), loaded.total, len(loaded.heldout)) == (600, 1280, 320)
    assert loaded.format == "scam"
    assert 0.4 < sum(example.label == "scam" for example in loaded.train) / 600 < 0.6
    assert sum(example.label == "scam" for example in loaded.heldout) == 160
    assert HeldoutRuns(loaded.heldout).near(loaded.train) == [("train:1105", "heldout:259")]
    assert repeated(loaded.train) == loaded.exact_across == 0


# Rows with faults


def faulty() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [*pairs(4)]
    rows[1]["completion"] = 7
    rows[3] = {"prompt": "", "completion": "x"}
    return rows


def test_rows_with_faults_are_refused_with_the_first_and_their_number(tmp_path: Path) -> None:
    refused(
        tmp_path,
        faulty(),
        r"rows\.jsonl, row 1: response = 7 is int.*\. 2 of 4 rows cannot train \(1 response is not "
        r"text, 1 empty question\): correct them, or leave them out with data\.on_bad_row=skip",
        shuffle=False,
    )


def test_rows_with_faults_are_left_out_and_counted_if_asked(tmp_path: Path) -> None:
    loaded = load(tmp_path, faulty(), on_bad_row="skip", shuffle=False)
    assert ids(loaded.train) == ["train:0", "train:2"]
    assert loaded.skipped == {"response is not text": 1, "empty question": 1}
    assert ids(load(tmp_path, faulty(), on_bad_row="skip", shuffle=False, rows=2).train) == [
        "train:0",
        "train:2",
    ]


def test_faults_behind_the_rows_that_are_taken_do_not_matter(tmp_path: Path) -> None:
    assert ids(load(tmp_path, faulty(), rows=1, shuffle=False).train) == ["train:0"]


def test_rows_that_all_have_faults_are_refused_in_either_way(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": 1}]
    refused(tmp_path, rows, "1 of 1 rows cannot train")
    refused(tmp_path, rows, "none of 1 rows can be used, 1 skipped", on_bad_row="skip")


# Mixes


def mix(tmp_path: Path, **data: Any) -> DataConfig:
    one, two = write(tmp_path / "a.csv", pairs(4)), write(tmp_path / "b.jsonl", pairs(10, "Other"))
    parts = [{"source": one, "weight": 2}, {"source": two, "weight": 0.5}]
    return DataConfig(mix=parts, **data)  # type: ignore[arg-type]


def test_an_epoch_of_a_mix_has_each_row_as_often_as_its_weight_says(tmp_path: Path) -> None:
    loaded = load_examples(mix(tmp_path), 0)
    rows = [example.row_id.split("+")[0] for example in loaded.train]
    first = [row for row in rows if row.startswith("1/")]
    second = [row for row in rows if row.startswith("2/")]
    assert sorted(first) == sorted([f"1/train:{number}" for number in range(4)] * 2)
    assert len(second) == len(set(second)) == 5
    assert len(set(ids(loaded.train))) == 13
    assert [(part.rows, part.weight) for part in loaded.mixed] == [(8, 2.0), (5, 0.5)]
    assert repeated(loaded.train) == 0  # copies are no duplicates
    assert ids(load_examples(mix(tmp_path), 0).train) == ids(loaded.train)
    assert set(ids(load_examples(mix(tmp_path), 1).train)) != set(ids(loaded.train))


def test_heldout_rows_of_a_mix_are_drawn_from_each_source_or_come_from_a_file(
    tmp_path: Path,
) -> None:
    loaded = load_examples(mix(tmp_path, heldout=0.5), 0)
    assert {row_id[:2] for row_id in ids(loaded.heldout)} == {"1/", "2/"}
    assert len(loaded.heldout) == 7
    assert not set(ids(loaded.heldout)) & {row_id.split("+")[0] for row_id in ids(loaded.train)}
    other = write(tmp_path / "other.jsonl", pairs(3, "Else"))
    assert len(load_examples(mix(tmp_path, heldout=other), 0).heldout) == 3


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ({"heldout": "test"}, "with data.mix it is a file or a fraction"),
        ({"rows": 3}, "with data.mix each source has `rows` of its own"),
        ({"mix": [{"source": "a.csv", "weight": 0}]}, "greater than 0"),
        ({"mix": [{"weight": 1}]}, "source"),
    ],
)
def test_what_a_mix_cannot_do_is_refused(tmp_path: Path, data: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        load_examples(mix(tmp_path, **data) if "mix" not in data else DataConfig(**data), 0)


def test_a_mix_is_given_on_the_command_line() -> None:
    from glassloop.config.arguments import ConfigError, parse

    config = parse(["data.mix=[{source: a.csv, weight: 2}, {source: b.csv}]"])
    assert [(one.source, one.weight) for one in config.data.mix] == [("a.csv", 2.0), ("b.csv", 1.0)]
    with pytest.raises(ConfigError, match=r"data\.mix"):
        parse(["data.mix=[{source: a.csv"])
