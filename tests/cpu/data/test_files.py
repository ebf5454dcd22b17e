"""Files of rows: their text is what trains, damage is named."""

from __future__ import annotations

import datetime
import gzip
import json
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from row_files import answers, load, refused, turns, write

from glassloop.config import DataConfig
from glassloop.data import arrow_files, text_files
from glassloop.data.scam import SCAM_QUESTION
from glassloop.data.sources import load_examples

KINDS = ["csv", "tsv", "json", "jsonl", "parquet", "arrow", "csv.gz", "jsonl.xz", "json.bz2"]
TEXTS = ["NA", "None", "null", "007", "1e5", "2024-01-05", '"Yes"', "true", "", "[1]", " x\ty "]


def test_the_same_rows_come_out_of_every_kind_of_file(tmp_path: Path) -> None:
    dialogues = ['caller: "Hi, there"\nreceiver: é', "12", "NA"]
    rows = [
        {"dialogue": dialogue, "type": "null", "label": number % 2}
        for number, dialogue in enumerate(dialogues)
    ]
    for name in (*(f"rows.{kind}" for kind in KINDS), "a [1] *.csv", "rows.jsonl.zst", "a.CSV"):
        path = write(tmp_path / name.lower(), rows)
        if name != name.lower():
            path = str(Path(path).rename(tmp_path / name))
        loaded = load_examples(DataConfig(source=path, shuffle=False), 0)
        assert loaded.format == "scam", name
        asked = [example.turns[0].content for example in loaded.train]
        assert asked == [SCAM_QUESTION + dialogue for dialogue in dialogues], name
        assert [example.row_id for example in loaded.train] == ["train:0", "train:1", "train:2"]
        assert [example.label for example in loaded.train] == ["honest", "scam", "honest"]


@pytest.mark.parametrize("how", ["file", "folder", "glob", "list"])
@pytest.mark.parametrize("kind", KINDS)
def test_text_stays_the_text_of_the_file_whatever_reads_it(
    tmp_path: Path, kind: str, how: str
) -> None:
    texts = [text for text in TEXTS if text]
    rows = [{"prompt": f"q{number}", "completion": text} for number, text in enumerate(texts)]
    path = write(tmp_path / "rows" / f"a.{kind}", rows)
    source = {
        "file": path,
        "folder": str(tmp_path / "rows"),
        "glob": str(tmp_path / "rows" / f"*.{kind}"),
        "list": f"{path}, {path}",
    }[how]
    assert answers(load_examples(DataConfig(source=source), 0)) == texts


def test_a_number_in_one_row_changes_no_other_row_and_is_named_by_its_own(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "Say yes in quotes.", "completion": '"Yes"'},
        {"prompt": "What is null in JSON?", "completion": "null"},
        {"prompt": "2+3", "completion": 5},
    ]
    refused(tmp_path, rows, r"row 2: response = 5 is int, not text", shuffle=False)
    assert answers(load(tmp_path, rows, rows=2, shuffle=False)) == ['"Yes"', "null"]
    assert answers(load(tmp_path, rows, on_bad_row="skip")) == ['"Yes"', "null"]
    talks = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]}
        for text in ('"Yes"', 5)
    ]
    refused(tmp_path, talks, r"row 1, message 1: content = 5 is int", shuffle=False)
    assert answers(load(tmp_path, talks, on_bad_row="skip")) == ['"Yes"']


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_types_of_a_table_stay_and_are_refused_where_text_is_wanted(
    tmp_path: Path, kind: str
) -> None:
    day = datetime.date(2024, 1, 5)
    rows = [{"prompt": "when?", "completion": "2024-01-05"}, {"prompt": "when?", "completion": ""}]
    assert answers(load(tmp_path, rows, f"a.{kind}")) == ["2024-01-05"]
    refused(
        tmp_path,
        [{"prompt": "when?", "completion": day}],
        r"row 0: response = datetime.date\(2024, 1, 5\) is date, not text",
        f"b.{kind}",
    )


def test_a_column_of_type_json_is_read_as_values_and_refused_as_text(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]

    def saved(name: str, cells: list[Any]) -> str:
        column = pyarrow.ExtensionArray.from_storage(
            pyarrow.json_(), pyarrow.array([json.dumps(cell) for cell in cells])
        )
        questions = pyarrow.array(["q"] * len(cells))
        table = pyarrow.table({"prompt": questions, name: column})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
        return str(tmp_path / f"{name}.parquet")

    assert turns(load_examples(DataConfig(source=saved("messages", [talk])), 0))[1][1] == "a"
    with pytest.raises(ValueError, match=r"row 0: response = '\"Yes\"' stands in a column of type"):
        load_examples(DataConfig(source=saved("completion", ["Yes"])), 0)


# Tables of text


@pytest.mark.parametrize(
    "content",
    [
        'question,answer\n"a, b",c;d\n',
        'question;answer\n"a, b";"c;d"\n',
        "question\tanswer\na, b\tc;d\n",
        'sep=|\r\nquestion|answer\r\n"a, b"|c;d\r\n',
        '\ufeffquestion;answer\r\na, b;"c;d"\r\n',
        ',question,answer\n0,"a, b",c;d\n',
        'question,answer,\n"a, b",c;d,\n',
        'Unnamed: 0,question,answer\n0,"a, b",c;d\n',
        'question,answer\r"a, b",c;d\r',
    ],
    ids=["comma", "semicolon", "tab", "sep=", "Excel", "index", "trailing", "pandas", "old Mac"],
)
def test_tables_are_read_as_spreadsheets_write_them(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.csv").write_text(content, encoding="utf-8", newline="")
    loaded = load_examples(DataConfig(source=str(tmp_path / "a.csv")), 0)
    assert turns(loaded) == [("user", "a, b", None), ("assistant", "c;d", None)]
    named = "(unnamed)" if content.startswith(",") or ",\n" in content else ""
    assert named in loaded.notes[0]


def test_a_tsv_keeps_commas_and_a_column_alone_needs_no_delimiter(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("question\tanswer\na,b\tc,d\n")
    assert turns(load_examples(DataConfig(source=str(tmp_path / "a.tsv")), 0))[0][1] == "a,b"
    (tmp_path / "b.csv").write_text('text\n"one, two"\n')
    assert turns(load_examples(DataConfig(source=str(tmp_path / "b.csv")), 0))[0][1] == "one, two"


# Damage


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.csv", b"", r"data\.source = .*a\.csv: the file is empty"),
        ("a.jsonl", b"\n \n", "the file is empty"),
        ("a.parquet", b"", "the file is empty"),
        ("a.csv", b"prompt,completion\n", "has no rows"),
        ("a.json", b"[]", "has no rows"),
        (
            "a.csv",
            b"prompt,completion\nx,\xff\xfe\n",
            r"line 2 is not UTF-8 near b'.*iconv -f WINDOWS",
        ),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xc3"}\n', "line 2 is not UTF-8"),
        ("a.json", b'[{"prompt": "a"},\n{"prompt": "\xc3"}]\n', "line 2 is not UTF-8"),
        ("a.csv", b"prompt,completion\nx,y\nx\0,y\n", "NUL byte in line 3"),
        ("a.csv", "prompt,completion\nx,y".encode("utf-16"), "UTF-16; convert it .iconv -f UTF-16"),
        ("a.csv", b"prompt,completion\nx,y\nx,y,z\n", r"row 1: 3 cells .* for 2 columns"),
        ("a.csv", b"prompt;completion\nx;y;z\n", "row 0: 3 cells.*a cell with a semicolon"),
        ("a.csv", b"prompt,completion\nx\n", "row 0: 1 cells"),
        ("a.csv", b'prompt,completion\n"x,y\n', "line 2: unexpected end of data"),
        ("a.csv", b"prompt,prompt\nx,y\n", "columns prompt, prompt are not all different"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', r"line 2: Expecting value in '\{\"prompt\""),
        ("a.jsonl", b"5\n", "line 1: '5' is not a JSON object"),
        ("a.jsonl", b'{"a": ' + b"1" * 5000 + b"}\n", "line 1: Exceeds the limit"),
        ("a.json", b'[{"prompt": ', "line 1: Expecting value; the file must be a list of JSON"),
        ("a.json", b"[null]", "row 0: None is not a JSON object"),
        ("a.parquet", b"junk", "cannot be read: Parquet.*; the file is damaged"),
        ("a.arrow", b"junk" * 9, "cannot be read: .*; the file is damaged"),
        ("a.jsonl.gz", b"junk", "cannot be read: .*; the file is damaged or no gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}' * 99, mtime=0)[:-9], "damaged or no gzip file"),
        ("a.csv.xz", b"junk", "damaged or no xz file"),
        ("a.csv.zst", b"junk" * 9, "damaged or no zstd file"),
        ("a.txt", b"x", r"a file must end in \.csv, \.tsv, .*\.parquet.*, not \.txt"),
        ("a.parquet.gz", b"x", r"a file must end in .*\(text also \.gz"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\nx", "a Git LFS pointer, not"),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\nx", "git lfs pull"),
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


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.csv")
    with pytest.raises(ValueError, match=r"a\.csv: it is not a plain file"):
        load_examples(DataConfig(source=str(tmp_path / "a.csv")), 0)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json", "a.parquet"])
def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(write(tmp_path / name, [{"prompt": "a", "completion": "b"}] * 3))
    decoded, rows = text_files._decoded, arrow_files._rows

    def grow(*given: Any) -> Any:
        with path.open("ab") as file:
            file.write(b" ")
        return (rows if name == "a.parquet" else decoded)(*given)

    def touched(file: Any, *given: Any) -> Any:
        path.touch()
        return opened(file, *given)

    opened = text_files._opened
    monkeypatch.setattr(arrow_files, "_rows", grow)
    monkeypatch.setattr(text_files, "_decoded", grow)
    if name == "a.json":  # read at once, before it is decoded
        monkeypatch.setattr(text_files, "_opened", touched)
    with pytest.raises(ValueError, match="the file changed while it was read; start again once"):
        load_examples(DataConfig(source=str(path)), 0)


def test_a_file_that_grows_without_end_is_not_read_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}]))
    decoded = text_files._decoded

    def grow(*given: Any) -> Any:
        with path.open("ab") as file:
            file.write(b'{"prompt": "a", "completion": "b"}\n')
        return decoded(*given)

    monkeypatch.setattr(text_files, "_decoded", grow)
    with pytest.raises(ValueError, match="the file changed while it was read"):
        load_examples(DataConfig(source=str(path)), 0)


# Size


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.jsonl.gz"])
def test_a_line_without_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "LINE_BYTES", 1000)
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b" * 2000}]
    where = "line 3" if name == "a.csv" else "line 2"
    refused(tmp_path, rows, rf"{where}: it is longer than 1,000 bytes, and no row that", name)


def test_a_cell_over_many_lines_is_bounded_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "LINE_BYTES", 1000)
    rows = [{"prompt": "a", "completion": "b\n" * 2000}]
    refused(tmp_path, rows, "field larger than field limit", "a.csv")


@pytest.mark.parametrize("kind", [*KINDS, "jsonl.zst"])
def test_rows_that_unpack_to_more_than_the_limit_are_refused(tmp_path: Path, kind: str) -> None:
    rows = [{"prompt": f"a{number}", "completion": "b" * 5000} for number in range(400)]
    match = r"more than data\.max_gib = 0\.001 GiB.*raise data\.max_gib"
    refused(tmp_path, rows, match, f"a.{kind}", max_gib=0.001)
    assert len(load(tmp_path, rows, f"a.{kind}", max_gib=0.01).train) == 400


def test_a_parquet_bomb_is_refused_by_what_it_unpacks_to(tmp_path: Path) -> None:
    # A dictionary holds the text once, and every row points to it.
    once = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 3000, "int32"), ["b" * 10_000])
    table = pyarrow.table({"prompt": ["a"] * 3000, "completion": once})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, compression="zstd")
    assert path.stat().st_size < 10_000
    with pytest.raises(ValueError, match=r"unpack to more than data\.max_gib = 0\.01 GiB"):
        load_examples(DataConfig(source=str(path), max_gib=0.01), 0)


@pytest.mark.parametrize("asked", ["row.csv", "rows.csvv", "Rows.csv"])
def test_a_name_that_is_nearly_a_files_name_is_refused_with_that_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no way there")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("prompt,completion\nx,y\n")
    with pytest.raises(ValueError, match=r"did you mean rows\.csv\?$"):
        load_examples(DataConfig(source=asked), 0)
    with pytest.raises(ValueError, match=r"no such file \(looked in .*\)$"):
        load_examples(DataConfig(source="other.json"), 0)
