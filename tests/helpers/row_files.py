"""Files of rows in every kind, and short ways to load them."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from glassloop.config import DataConfig
from glassloop.data.rows import Example
from glassloop.data.sources import Loaded, load_examples

PACKERS = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """`rows` as the kind of file that the name says; its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    suffixes = [suffix for suffix in path.suffixes if suffix not in (*PACKERS, ".zst")]
    kind = suffixes[-1]
    if kind in (".parquet", ".arrow"):
        table = pyarrow.Table.from_pylist(rows)
        if kind == ".parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            with pyarrow.ipc.new_file(path, table.schema) as file:
                file.write_table(table)
        return str(path)
    plain = path.parent / f"plain{kind}"
    if kind in (".csv", ".tsv"):
        with plain.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t" if kind == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        text = f"[{','.join(lines)}]" if kind == ".json" else "\n".join(lines)
        plain.write_text(text, encoding="utf-8")
    raw = plain.read_bytes()
    plain.unlink()
    if path.suffix == ".zst":
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(raw)
    else:
        path.write_bytes(PACKERS.get(path.suffix, bytes)(raw))
    return str(path)


def load(
    folder: Path,
    cells: list[dict[str, Any]],
    name: str = "rows.jsonl",
    seed: int = 0,
    **data: Any,
) -> Loaded:
    """Examples of `cells`, written to a file of the folder."""
    return load_examples(DataConfig(source=write(folder / name, cells), **data), seed)


def refused(
    folder: Path, cells: list[dict[str, Any]], match: str, name: str = "rows.jsonl", **data: Any
) -> None:
    """Hold that `cells` are refused with a message that matches."""
    with pytest.raises(ValueError, match=match):
        load(folder, cells, name, **data)


def pairs(count: int, what: str = "Question") -> list[dict[str, str]]:
    return [
        {"prompt": f"{what} {number}?", "completion": f"Answer {number}."}
        for number in range(count)
    ]


def ids(examples: tuple[Example, ...]) -> list[str]:
    return [example.row_id for example in examples]


def turns(loaded: Loaded, at: int = 0) -> list[tuple[str, str, str | None]]:
    """(role, content, reasoning) of one example."""
    return [(turn.role, turn.content, turn.reasoning) for turn in loaded.train[at].turns]


def answers(loaded: Loaded) -> list[str]:
    """Last turns of all examples, in the order of their rows."""
    rows = sorted(loaded.train, key=lambda example: int(example.row_id.rpartition(":")[2]))
    return [example.turns[-1].content for example in rows]
