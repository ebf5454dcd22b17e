"""Rows that are damaged or mean harm: the first table of docs/reliability.md."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from glassloop.config import DataConfig
from glassloop.data.dataset import build_rows, summary
from glassloop.data.sources import load_examples
from glassloop.data.templates import make_template

if TYPE_CHECKING:
    from hostile_place import Case, Place

WORDS = b"prompt,completion\nq,NA\nq,null\nq,007\n"
GOOD = b'{"prompt": "who calls?", "completion": "nobody"}\n'


def data(name: str, content: bytes, **fields: Any) -> Callable[[Place], str]:
    """The rows of a file, and their lines in the header."""

    def gets(place: Place) -> str:
        path = place.folder / name
        path.write_bytes(content)
        settings = DataConfig(source=str(path), template="chat", **{"max_tokens": 64, **fields})
        loaded = load_examples(settings, 0)
        rows = build_rows(loaded, make_template(settings, place.tokenizer, loaded.train), settings)
        controls = {place.tokenizer.eos_token_id, place.tokenizer.bos_token_id}
        count = sum(token in controls for row in rows.train.rows for token in row.input_ids) / len(
            rows.train.rows
        )
        told = summary(rows, settings)
        said = [re.sub(r"^training *", "", line.strip()) for line in told if "rows kept" in line]
        said += [
            line.strip() for line in told if re.search("not read: |control tokens|alone", line)
        ]
        said += [line.strip() for line in told if "without loss" in line or "not written" in line]
        skipped = "".join(
            f", {count} skipped ({reason})" for reason, count in loaded.skipped.items()
        )
        said[0] += f"{skipped}; {count:g} begin and end tokens a row"
        return "; ".join(said)

    return gets


def folder(files: dict[str, bytes], **fields: Any) -> Callable[[Place], str]:
    """The answers in a folder with these files."""

    def gets(place: Place) -> str:
        path = place.folder / "rows"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        for name, content in files.items():
            (path / name).write_bytes(content)
        settings = DataConfig(source=str(path), **{"shuffle": False, **fields})
        loaded = load_examples(settings, 0)
        return ", ".join(example.turns[-1].content for example in loaded.train)

    return gets


def asked(*answers: dict[str, Any], **cells: Any) -> bytes:
    """A row of messages: one question an answer."""
    said = [{"role": "assistant", "content": "yes", **answer} for answer in answers]
    turns = [turn for answer in said for turn in ({"role": "user", "content": "ok?"}, answer)]
    return lines({"messages": turns, **cells})


def bomb() -> bytes:
    """A small parquet file whose 3,000 rows share one long text."""
    import io

    import pyarrow
    import pyarrow.parquet

    once = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 3000, "int32"), ["b" * 10_000])
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"prompt": once, "completion": once}), file)
    return file.getvalue()


def readme(path: str) -> bytes:
    return f"---\nconfigs:\n- data_files: {path}\n---\n".encode()


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def row_cases(harm: bytes) -> list[Case]:
    """Cases of rows: what is given, and what became of it.

    `harm`: a pickle that names a function.
    """
    return [*broken_files(harm), *odd_rows(), *odd_files(), *odd_turns()]


def broken_files(harm: bytes) -> list[Case]:
    return [
        ("an empty csv file", data("a.csv", b"")),
        ("a csv file with a header alone", data("a.csv", b"prompt,completion\n")),
        ("an empty jsonl file", data("a.jsonl", b"\n \n")),
        ("a json file with an empty list", data("a.json", b"[]")),
        ("an empty parquet file", data("a.parquet", b"")),
        ("a parquet file of other bytes", data("a.parquet", b"PAR1 junk PAR1")),
        ("a pickle called parquet", data("a.parquet", harm)),
        ("a csv row with a cell too many", data("a.csv", b"prompt,completion\nx,y,z\n")),
        ("a csv cell whose quote never ends", data("a.csv", b'prompt,completion\n"x,y\n')),
        ("two csv columns of one name", data("a.csv", b"prompt,prompt\nx,y\n")),
        ("a json file cut short", data("a.json", b'[{"prompt": ')),
        ("a jsonl line cut short", data("a.jsonl", GOOD + b'{"prompt": \n')),
        ("a jsonl line that is a number", data("a.jsonl", b"5\n")),
        ("a jsonl line of 100,000 brackets", data("a.jsonl", b"[" * 100_000 + b"\n")),
        ("a json file of 100,000 brackets", data("a.json", b"[" * 100_000)),
        ("a json list that holds null", data("a.json", b"[null, " + GOOD + b"]")),
    ]


def odd_files() -> list[Case]:
    return [
        ("NA, null and 007 in a folder of csv", folder({"a.csv": WORDS})),
        ("a gzip file cut short", data("a.jsonl.gz", gzip.compress(GOOD * 99, mtime=0)[:-9])),
        ("a parquet bomb", data("a.parquet", bomb(), max_gib=0.01)),
        (
            "a line that is longer than 64 MiB",
            data("a.jsonl", b'{"prompt": "x", "completion": "' + b"y" * 2**26 + b'"}\n'),
        ),
        (
            "a Git LFS pointer",
            data("a.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        ),
        (
            "a README that names a file outside",
            folder({"a.csv": WORDS, "README.md": readme("../x")}),
        ),
        (
            "a README that grows by aliases",
            folder({"a.csv": WORDS, "README.md": b"---\na: &a [x]\nb: [*a, *a]\n---\n"}),
        ),
        ("a folder that save_to_disk did not write", folder({"state.json": b"{}"})),
    ]


def odd_rows() -> list[Case]:
    marks = "</s><|assistant|>yes<s>"
    huge = lines(
        {"prompt": "yes?", "completion": "word " * 200_000}, {"prompt": "a", "completion": "b"}
    )
    return [
        ("columns that fit no format", data("a.jsonl", lines({"who": "a", "what": "b"}))),
        (
            "a number where text is wanted",
            data("a.jsonl", lines({"prompt": 5, "completion": "x"})),
        ),
        ("a NUL byte in csv", data("a.csv", b"prompt,completion\nx\0,y\n")),
        (
            "a NUL character in a json string",
            data("a.jsonl", lines({"prompt": "x\0", "completion": "y"})),
        ),
        ("broken UTF-8", data("a.jsonl", b'{"prompt": "\xc3", "completion": "y"}\n')),
        ("UTF-16", data("a.csv", "prompt,completion\nx,y".encode("utf-16"))),
        (
            "half of a surrogate pair",
            data("a.jsonl", b'{"prompt": "\\ud800", "completion": "y"}\n'),
        ),
        (
            "an empty answer among others",
            data("a.jsonl", lines({"prompt": "a", "completion": " "}) + GOOD),
        ),
        ("a row of a million characters, too_long = drop", data("a.jsonl", huge)),
        (
            "a row of a million characters, too_long = cut",
            data("a.jsonl", huge, too_long="cut"),
        ),
        (
            "control tokens as text in question and answer",
            data("a.jsonl", lines({"prompt": marks, "completion": marks})),
        ),
        (
            "the same row without them",
            data("a.jsonl", lines({"prompt": "yes", "completion": "yes"})),
        ),
        (
            "a number in one of three rows",
            data("a.jsonl", lines({"prompt": "x", "completion": 5}) + GOOD + GOOD),
        ),
        (
            "the same, on_bad_row = skip",
            data("a.jsonl", lines({"prompt": "x", "completion": 5}) + GOOD, on_bad_row="skip"),
        ),
        ("a csv file with an unnamed index", data("a.csv", b",prompt,completion\n0,x,y\n")),
        ("semicolons and Excel's mark", data("a.csv", b"\xef\xbb\xbfprompt;completion\nx;y\n")),
    ]


def odd_turns() -> list[Case]:
    return [
        (
            "an answer that only closes a think block",
            data("a.jsonl", asked({"content": "a\n</think>\nb"})),
        ),
        (
            "an answer that opens a think block for ever",
            data("a.jsonl", asked({"content": "<think>a"})),
        ),
        ("a turn with weight 0", data("a.jsonl", asked({"weight": 0}, {}))),
        ("a turn with weight 0.5", data("a.jsonl", asked({"weight": 0.5}))),
        ("tools beside the messages", data("a.jsonl", asked({}, tools=[{"name": "f"}]))),
        (
            "a tool call, and a template that writes none",
            data("a.jsonl", asked({"tool_calls": [{"name": "f", "arguments": {}}]})),
        ),
        (
            "a preference file",
            data("a.jsonl", lines({"prompt": "x", "chosen": "y", "rejected": "z"})),
        ),
        (
            "two columns that may be the answer",
            data("a.jsonl", lines({"problem": "x", "answer": "y", "solution": "z"})),
        ),
        (
            "a file that is not there",
            lambda place: str(load_examples(DataConfig(source=str(place.folder / "none.csv")), 0)),
        ),
    ]
