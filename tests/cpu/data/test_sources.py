"""Which rows are read, what becomes of their columns, and what is refused, by name."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from glassloop.config.config import DataConfig
from glassloop.data import sources
from glassloop.data.duplicates import near_duplicates
from glassloop.data.formats import CONCLUSIONS, CUES, OTHER_CUES, SCAM_QUESTION, VERDICTS
from glassloop.data.rows import Example, Turn
from glassloop.data.sources import Loaded, load_examples, order, verdict_of

SHARED = Path(__file__).parents[4] / "shared" / "data"
CALL = "caller: Hello. receiver: Who is this?"


@pytest.fixture(scope="module", autouse=True)
def _datasets_cache_apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """`rows` as the kind of file that the name says; its path."""
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text(
            "\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]",
            encoding="utf-8",
        )
    return str(path)


def load(
    tmp_path: Path,
    cells: list[dict[str, Any]],
    name: str = "rows.jsonl",
    seed: int = 0,
    **data: Any,
) -> Loaded:
    return load_examples(DataConfig(source=write(tmp_path / name, cells), **data), seed)


def pairs(count: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"Question {number}?", "completion": f"Answer {number}."}
        for number in range(count)
    ]


def ids(examples: tuple[Example, ...]) -> list[str]:
    return [example.row_id for example in examples]


def refused(
    tmp_path: Path, cells: list[dict[str, Any]], match: str, name: str = "rows.jsonl", **data: Any
) -> None:
    with pytest.raises(ValueError, match=match):
        load(tmp_path, cells, name, **data)


# Files


@pytest.mark.parametrize(
    "name", ["rows.csv", "rows.json", "rows.jsonl", "rows.parquet", "a [1] *.csv"]
)
def test_the_same_rows_come_out_of_every_kind_of_file(tmp_path: Path, name: str) -> None:
    dialogues = ['caller: "Hi, there"\nreceiver: é', "12", "NA"]
    rows = [
        {"dialogue": dialogue, "type": "null", "label": number % 2}
        for number, dialogue in enumerate(dialogues)
    ]
    loaded = load(tmp_path, rows, name, shuffle=False)
    assert loaded.format == "scam"
    assert ids(loaded.train) == ["train:0", "train:1", "train:2"]
    assert [
        example.turns[0].content.removeprefix(SCAM_QUESTION) for example in loaded.train
    ] == dialogues
    assert [example.label for example in loaded.train] == ["honest", "scam", "honest"]


def test_a_folder_is_read_with_its_splits(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", pairs(3))
    write(tmp_path / "test.jsonl", [{"prompt": "Else?", "completion": "Yes."}])
    loaded = load_examples(DataConfig(source=str(tmp_path), heldout="test", shuffle=False), 0)
    assert ids(loaded.train) == ["train:0", "train:1", "train:2"]
    assert ids(loaded.heldout) == ["test:0"]


def test_a_hub_id_is_asked_for_with_config_split_and_revision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[dict[str, Any]] = []

    def fake(**arguments: Any) -> datasets.Dataset:
        asked.append(arguments)
        return datasets.Dataset.from_list(
            [{"Question": arguments["split"], "Complex_CoT": "Hm.", "Response": "Yes."}] * 2
        )

    monkeypatch.setattr(datasets, "load_dataset", fake)
    data = DataConfig(
        source="who/what", config="en", split="train[:9]", revision="abc", heldout="test"
    )
    loaded = load_examples(data, 0)
    common = {"path": "who/what", "name": "en", "revision": "abc"}
    assert asked == [{**common, "split": "train[:9]"}, {**common, "split": "test"}]
    assert sorted(ids(loaded.train)) == ["train[:9]:0", "train[:9]:1"]


def test_what_the_hub_refuses_is_said_with_the_fields_to_look_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fake(**_: Any) -> None:
        raise ConnectionError("no way there")

    monkeypatch.setattr(datasets, "load_dataset", fake)
    with pytest.raises(
        ValueError,
        match=r"data\.source = who/what cannot be read: no way there.*data\.config, data\.split",
    ):
        load_examples(DataConfig(source="who/what"), 0)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.csv", b"", r"data\.source = .*a\.csv: the file is empty"),
        ("a.jsonl", b"\n \n", "the file is empty"),
        ("a.csv", b"prompt,completion\n", "has no rows"),
        ("a.json", b"[]", "has no rows"),
        (
            "a.csv",
            b"prompt,completion\nx,\xff\xfe\n",
            r"line 2 is not UTF-8 near b'.*\\xff\\xfe.*iconv",
        ),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xc3"}\n', "line 2 is not UTF-8"),
        ("a.csv", b"prompt,completion\nx,y\nx\0,y\n", "NUL byte in line 3"),
        (
            "a.csv",
            "prompt,completion\nx,y".encode("utf-16"),
            "NUL byte in line 1.*not UTF-8|line 1 is not UTF-8",
        ),
        (
            "a.csv",
            b"prompt,completion\nx,y\nx,y,z\n",
            r"row 1: 3 cells \['x', 'y', 'z'\] for 2 columns",
        ),
        ("a.csv", b"prompt,completion\nx,y,z\n", "row 0: 3 cells"),
        ("a.csv", b"prompt,completion\nx\n", "row 0: 1 cells"),
        ("a.csv", b'prompt,completion\n"x,y\n', "line 2: unexpected end of data"),
        ("a.csv", b"prompt,prompt\nx,y\n", "columns prompt, prompt are not all different"),
        (
            "a.jsonl",
            b'{"prompt": "a"}\n{"prompt": \n',
            r"line 2: Expecting value in '\{\"prompt\": '",
        ),
        ("a.jsonl", b"5\n", "line 1: '5' is not a JSON object"),
        (
            "a.json",
            b'[{"prompt": ',
            "cannot be read: Expected object or value.*; the file is damaged",
        ),
        ("a.parquet", b"junk", "cannot be read: Parquet"),
        ("a.txt", b"x", r"a file must end in \.csv, \.json, \.jsonl, \.parquet, not \.txt"),
    ],
)
def test_a_damaged_file_is_refused_with_its_name_and_the_place(
    tmp_path: Path, name: str, content: bytes, match: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=match):
        load_examples(DataConfig(source=str(tmp_path / name)), 0)


def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no such file"):
        load_examples(DataConfig(source=str(tmp_path / "calls.csv")), 0)


def test_the_sample_loads_and_its_absence_says_where_it_lies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded = load_examples(DataConfig(source="sample", heldout=0.25), 3407)
    assert loaded.format == "scam"
    assert len(loaded.train) + len(loaded.heldout) >= 64
    assert all(example.turns[-1].reasoning for example in loaded.train)
    monkeypatch.setattr(sources, "SAMPLE", tmp_path / "calls.jsonl")
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
            r"data\.heldout = test: data\.source = .* is one file without splits",
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
        ({"split": "test"}, r"data\.split = test: .* is one file and has no splits"),
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
    loaded = load(tmp_path, [*pairs(3), *pairs(2)])
    assert loaded.repeated == 2


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
    assert near_duplicates(train, heldout) == [("train:near", "test:0")]


def test_the_words_that_every_question_begins_with_make_no_near_duplicates() -> None:
    assert (
        near_duplicates([ask("train:0", "caller: hello")], [ask("test:0", "caller: goodbye")]) == []
    )


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there")
def test_real_rows_load_balanced_with_their_near_duplicate_found() -> None:
    train, test = (str(SHARED / f"scam-dialogue_shaped_{name}.csv") for name in ("train", "test"))
    loaded = load_examples(DataConfig(source=train, heldout=test, rows=600), 3407)
    assert (len(loaded.train), loaded.total, len(loaded.heldout)) == (600, 1280, 320)
    assert loaded.format == "scam"
    assert 0.4 < loaded.labels["scam"] / 600 < 0.6
    assert loaded.heldout_labels == {"honest": 160, "scam": 160}
    assert loaded.near_across == (("train:1105", "heldout:259"),)
    assert loaded.repeated == loaded.exact_across == 0


# Scam


def call(**cells: Any) -> dict[str, Any]:
    return {"dialogue": CALL, "type": "ssn", "label": 1, **cells}


def test_a_call_becomes_a_question_cues_and_a_verdict(tmp_path: Path) -> None:
    (example,) = load(tmp_path, [call()]).train
    question, answer = example.turns
    assert question == Turn("user", SCAM_QUESTION + CALL)
    assert answer == Turn(
        "assistant", "Verdict: scam", f"{CUES['ssn', 'scam']} {CONCLUSIONS['scam']}"
    )
    assert example.label == "scam"


def test_the_prompt_of_a_call_depends_on_neither_type_nor_label(tmp_path: Path) -> None:
    rows = [
        call(type=kind, label=int(label == "scam"))
        for kind, label in [*CUES, ("odd", "scam"), ("odd", "honest")]
    ]
    loaded = load(tmp_path, rows)
    assert {example.turns[0] for example in loaded.train} == {Turn("user", SCAM_QUESTION + CALL)}
    assert {example.label for example in loaded.train} == {"scam", "honest"}


@pytest.mark.parametrize(("kind", "label"), [("odd", 1), ("odd", 0), ("ssn", 0), (None, 1)])
def test_a_type_that_is_unknown_or_known_for_the_other_class_gets_the_general_cues(
    tmp_path: Path, kind: str, label: int
) -> None:
    name = "scam" if label else "honest"
    (example,) = load(tmp_path, [call(type=kind, label=label)]).train
    assert example.turns[1].reasoning == f"{OTHER_CUES[name]} {CONCLUSIONS[name]}"


def test_no_reasoning_stands_in_a_call_if_none_is_asked_for(tmp_path: Path) -> None:
    (example,) = load(tmp_path, [{"dialogue": CALL, "label": "0"}], scam_reasoning="none").train
    assert example.turns[1] == Turn("assistant", "Verdict: not a scam", None)


def test_reasoning_and_response_of_a_call_are_kept_where_it_brings_them(tmp_path: Path) -> None:
    rows = [
        call(reasoning="They hurry.", response="Hang up.\nVerdict: scam"),
        call(reasoning="", response="Verdict: scam"),
    ]
    loaded = load(tmp_path, rows, shuffle=False)
    assert loaded.train[0].turns[1] == Turn("assistant", "Hang up.\nVerdict: scam", "They hurry.")
    assert loaded.train[1].turns[1].reasoning == f"{CUES['ssn', 'scam']} {CONCLUSIONS['scam']}"


@pytest.mark.parametrize(
    ("response", "claim"),
    [("Verdict: not a scam", "says honest"), ("It is bad.", "names no verdict")],
)
def test_a_response_that_contradicts_the_label_is_refused(
    tmp_path: Path, response: str, claim: str
) -> None:
    refused(
        tmp_path,
        [call(response="Verdict: scam"), call(response=response)],
        rf"row 1: the response {claim}, but label = 1 says scam",
    )


@pytest.mark.parametrize("label", [1, "1", 1.0, True, "scam", " Scam "])
def test_a_scams_label_may_be_written_in_several_ways(tmp_path: Path, label: Any) -> None:
    assert load(tmp_path, [call(label=label)]).train[0].label == "scam"


@pytest.mark.parametrize("label", [2, "", "maybe", None, 0.5])
def test_another_label_is_refused(tmp_path: Path, label: Any) -> None:
    refused(tmp_path, [call(label=label)], "row 0: label = .*labelled 1 or scam, 0 or honest")


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Verdict: scam", "scam"),
        ("Hang up.\n**Verdict:** Scam.", "scam"),
        ("Verdict: 'not a scam'", "honest"),
        ("verdict : Not a scam!", "honest"),
        ("Verdict: scam\nOn second thought:\nVerdict: not a scam", "honest"),
        ("Verdict: scam\n</think>\n\nVerdict: not a scam<end>", None),
        ("Verdict: scam\n</think>\n\nVerdict: not a scam", "honest"),
        ("Verdict: scam\n</think>\n\nI do not know.", None),
        ("Verdict: scam or not a scam", None),
        ("Verdict:", None),
        ("This is a scam.", None),
        ("", None),
        *[(text, label) for label, text in VERDICTS.items()],
    ],
)
def test_the_verdict_is_read_from_the_last_verdict_line(text: str, verdict: str | None) -> None:
    assert verdict_of(text) == verdict


# Other formats


def turns(loaded: Loaded) -> list[tuple[str, str, str | None]]:
    return [(turn.role, turn.content, turn.reasoning) for turn in loaded.train[0].turns]


BLOCK = "<think>\nHm.\n</think>\n\nYes."


@pytest.mark.parametrize(
    ("kind", "row", "want"),
    [
        ("reasoning", {"Question": "Q?", "Complex_CoT": "Hm.", "Response": "Yes."}, [("user", "Q?", None), ("assistant", "Yes.", "Hm.")]),
        ("prompt_completion", {"prompt": "Q?", "completion": " Yes."}, [("user", "Q?", None), ("assistant", " Yes.", None)]),
        ("prompt_completion", {"prompt": "Q?", "completion": BLOCK}, [("user", "Q?", None), ("assistant", "\n\nYes.", "\nHm.\n")]),
        ("alpaca", {"instruction": "Add.", "input": "1 2", "output": "3"}, [("user", "Add.\n\n1 2", None), ("assistant", "3", None)]),
        ("alpaca", {"instruction": "Add.", "input": "", "output": "3"}, [("user", "Add.", None), ("assistant", "3", None)]),
        ("alpaca", {"instruction": "Add.", "output": "3"}, [("user", "Add.", None), ("assistant", "3", None)]),
        (
            "messages",
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Q?"},
                    {"role": "assistant", "content": BLOCK},
                    {"role": "user", "content": "<think>mine</think>"},
                    {"role": "assistant", "content": "<think>\n\n</think>No.", "reasoning_content": None},
                    {"role": "user", "content": "left out"},
                ]
            },
            [
                ("system", "Be brief.", None),
                ("user", "Q?", None),
                ("assistant", "\n\nYes.", "\nHm.\n"),
                ("user", "<think>mine</think>", None),
                ("assistant", "No.", None),
            ],
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}]},
            [("user", "Q?", None), ("assistant", "Yes.", "Hm.")],
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "Yes."}]},
            [("user", "Q?", None), ("assistant", "Yes.", None)],
        ),
    ],
)  # fmt: skip
def test_a_format_is_told_by_its_columns_and_becomes_turns(
    tmp_path: Path, kind: str, row: dict[str, Any], want: list[tuple[str, str, str | None]]
) -> None:
    loaded = load(tmp_path, [row])
    assert loaded.format == kind
    assert turns(loaded) == want
    assert turns(load(tmp_path, [row], format=kind)) == want


def test_any_columns_serve_by_a_map(tmp_path: Path) -> None:
    row = {"id": 7, "ask": "Q?", "why": "Hm.", "say": "Yes."}
    columns = {"question": "ask", "reasoning": "why", "response": "say"}
    loaded = load(tmp_path, [row], columns=columns)
    assert loaded.format == "reasoning"
    assert turns(loaded) == [("user", "Q?", None), ("assistant", "Yes.", "Hm.")]
    del columns["reasoning"]
    assert turns(load(tmp_path, [row], columns=columns))[1] == ("assistant", "Yes.", None)
    assert turns(
        load(
            tmp_path,
            [{"talk": CALL, "bad": 1}],
            columns={"dialogue": "talk", "label": "bad"},
            scam_reasoning="none",
        )
    )[0] == ("user", SCAM_QUESTION + CALL, None)


def test_a_system_prompt_stands_before_rows_that_bring_none(tmp_path: Path) -> None:
    own = {
        "messages": [
            {"role": "system", "content": "Own."},
            {"role": "user", "content": "Q?"},
            {"role": "assistant", "content": "A."},
        ]
    }
    loaded = load(
        tmp_path, [own, {"messages": own["messages"][1:]}], system="Given.", shuffle=False
    )
    assert [example.turns[0] for example in loaded.train] == [
        Turn("system", "Own."),
        Turn("system", "Given."),
    ]


@pytest.mark.parametrize(
    ("row", "data", "match"),
    [
        (
            {"a": "x", "b": "y"},
            {},
            r"columns a, b, which fit no format; say what holds what, for example data\.columns\.question=",
        ),
        (
            {"a": "x", "b": "y"},
            {"columns": {"question": "c"}},
            r"data\.columns\.question = 'c': .* has no such column; it has a, b",
        ),
        (
            {"a": "x", "b": "y"},
            {"format": "scam"},
            r"has no column 'dialogue', which format scam reads as dialogue; it has a, b",
        ),
        (
            {"question": "x", "Complex_CoT": "y", "Response": "z"},
            {"format": "reasoning"},
            r"no column 'Question'.*did you mean 'question'\? \(set data\.columns\.question=NAME",
        ),
        ({"Question": "x", "Response": "z"}, {}, "no column 'Complex_CoT'"),
        ({"dialogue": "x", "label": 1}, {}, "no column 'type'"),
        ({"prompt": "x", "completion": "y"}, {"format": "alpaca"}, "no column 'instruction'"),
        (
            {"prompt": "x", "completion": "y"},
            {"format": "alpaca", "columns": {"dialogue": "prompt"}},
            r"data\.columns\.dialogue = 'prompt': format alpaca reads no such column",
        ),
    ],
)
def test_columns_that_are_missing_are_named_with_those_that_are_there(
    tmp_path: Path, row: dict[str, Any], data: dict[str, Any], match: str
) -> None:
    refused(tmp_path, [row], match, **data)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"prompt": "", "completion": "y"}, "row 1: question is empty"),
        ({"prompt": None, "completion": "y"}, "row 1: question is empty"),
        ({"prompt": 5, "completion": "y"}, "row 1: question = 5 is int, not text"),
        ({"prompt": ["x"], "completion": "y"}, r"row 1: question = \['x'\] is list, not text"),
        (
            {"prompt": "x" * 99, "completion": {"a": 1}},
            "row 1: response = {'a': 1} is dict, not text",
        ),
        (
            {"prompt": "x\0" + "y" * 99, "completion": "y"},
            r"row 1: question = 'x\\x00y+\.\.\. holds a NUL byte at character 1",
        ),
    ],
)
def test_a_cell_that_is_no_text_is_refused_with_row_and_value(
    tmp_path: Path, row: dict[str, Any], match: str
) -> None:
    refused(
        tmp_path, [{"prompt": "x", "completion": "y"}, row], rf"rows\.jsonl, {match}", shuffle=False
    )


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ("hello", "row 0: messages = 'hello'; a list of {role, content} is needed"),
        (["hello"], "row 0: messages = .*; a list of {role, content} is needed"),
        (
            [{"role": "tool", "content": "x"}],
            "row 0, message 0: role = 'tool'; known are system, user",
        ),
        ([{"content": "x"}], "row 0, message 0: role = None"),
        (
            [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": "", "tool_calls": [{"f": 1}]},
            ],
            "message 1: tool_calls = ",
        ),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            "row 0, message 0: content = .* is list, not text",
        ),
        ([{"role": "user", "content": " "}], "row 0, message 0: content is empty"),
    ],
)
def test_messages_that_are_none_are_refused_with_row_and_place(
    tmp_path: Path, messages: Any, match: str
) -> None:
    refused(tmp_path, [{"messages": messages}], match, format="messages")


def messages(*roles: str, content: str = "x") -> dict[str, Any]:
    return {
        "messages": [
            {"role": role, "content": content if role == "assistant" else role} for role in roles
        ]
    }


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (messages("user", "assistant", content=""), "empty response"),
        (messages("user", "assistant", content="<think>Hm.</think> "), "empty response"),
        (messages("user"), "no assistant turn"),
        (messages("assistant"), "user and assistant do not take turns"),
        (messages("user", "user", "assistant"), "user and assistant do not take turns"),
        (messages("user", "system", "assistant"), "user and assistant do not take turns"),
    ],
)
def test_rows_that_teach_nothing_are_skipped_and_counted_by_reason(
    tmp_path: Path, row: dict[str, Any], reason: str
) -> None:
    good = {"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]}
    loaded = load(tmp_path, [row, good, row], shuffle=False)
    assert ids(loaded.train) == ["train:1"]
    assert loaded.skipped == {reason: 2}
    assert loaded.total == 3
    refused(tmp_path, [row], f"none of 1 rows can be used, 1 skipped \\({reason}\\)")
    refused(
        tmp_path,
        [row, good],
        rf"data\.rows = 2, but .* only 1 usable rows of 2, 1 skipped \({reason}\)",
        rows=2,
    )


def test_an_empty_response_or_reasoning_is_skipped_and_counted(tmp_path: Path) -> None:
    rows = [
        {"Question": "Q?", "Complex_CoT": "Hm.", "Response": "Yes."},
        {"Question": "Q2?", "Complex_CoT": "Hm.", "Response": None},
        {"Question": "Q3?", "Complex_CoT": "", "Response": "Yes."},
    ]
    assert load(tmp_path, rows).skipped == {"empty response": 1, "empty reasoning": 1}
