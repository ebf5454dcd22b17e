"""Hostile input: a list gets what docs/reliability.md says, and no bytes a traceback."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import hostile
from hostile_place import Place
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from glassloop.config import Config, DataConfig
from glassloop.config.arguments import ConfigError, from_values, parse
from glassloop.config.names import field_names
from glassloop.data.sources import load_examples
from train_loop import update_once

DOCS = Path(__file__).resolve().parents[3] / "docs/reliability.md"
BEGIN, END = "<!-- made by tests/cpu/house/test_hostile.py: begin -->\n", "<!-- end -->\n"


def test_the_table_in_the_docs_is_what_these_inputs_get(
    tmp_path: Path, tiny_llama: Path, tiny_tokenizer: Any, run_of: Any
) -> None:
    run = run_of(record={"capture_updates": (2,)})
    run.begin()
    for update in (1, 2):
        run.tell(update_once(run, update))
    run.save(2)
    place = Place((tmp_path / "hostile").resolve(), tiny_llama, tiny_tokenizer, run)
    place.folder.mkdir()
    made = hostile.table(place)
    text = DOCS.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    committed, _, after = rest.partition(END)
    if os.environ.get("GLASSLOOP_WRITE_DOCS"):
        DOCS.write_text(f"{before}{BEGIN}{made}{END}{after}", encoding="utf-8")
    else:
        cure = "GLASSLOOP_WRITE_DOCS=1 python -m pytest tests/cpu/house/test_hostile.py writes it"
        assert committed.splitlines() == made.splitlines(), cure
    assert "Traceback" not in made
    assert made.count("refused: ") + made.count("taken: ") == sum(
        len(cases) for _, cases in hostile.sections()
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
KINDS = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".jsonl.gz", ".csv.zst")
PROMPTS = st.fixed_dictionaries({"prompt": JSON, "completion": JSON})
quiet = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def rows_or_reason(path: Path, content: bytes) -> None:
    """Rows come out, or a ValueError that names the file."""
    path.write_bytes(content)
    try:
        loaded = load_examples(DataConfig(source=str(path)), 0)
    except ValueError as error:
        assert path.name in str(error)
    else:
        assert all(turn.content for example in loaded.train for turn in example.turns)


@quiet
@given(content=st.binary(max_size=200), kind=st.sampled_from(KINDS), number=st.integers(0, 2**40))
@example(b"\xef\xbb\xbf", ".csv", 0)
@example(b"prompt,completion\r\na,b\rc,d", ".csv", 1)
@example(b'{"prompt": 1e999, "completion": ""}', ".jsonl", 2)
def test_any_bytes_give_rows_or_a_refusal_that_names_the_file(
    tmp_path: Path, content: bytes, kind: str, number: int
) -> None:
    rows_or_reason(tmp_path / f"bytes{number}{kind}", content)


@quiet
@given(
    rows=st.lists(PROMPTS | JSON, max_size=4),
    whole=st.booleans(),
    kind=st.sampled_from(["json", "jsonl"]),
)
@example([None, {"prompt": "a", "completion": "b"}], True, "json")
@example([None, {"prompt": "a", "completion": "b"}], False, "json")
def test_any_json_gives_rows_or_a_refusal_that_names_the_file(
    tmp_path: Path, rows: list[Any], whole: bool, kind: str
) -> None:
    text = json.dumps(rows) if whole else "".join(json.dumps(row) + "\n" for row in rows)
    rows_or_reason(tmp_path / f"rows.{kind}", text.encode())


@quiet
@given(table=st.lists(st.lists(st.text(max_size=6), min_size=1, max_size=3), max_size=4))
def test_any_cells_give_rows_or_a_refusal_that_names_the_file(
    tmp_path: Path, table: list[list[str]]
) -> None:
    text = "prompt,completion\n" + "".join(",".join(row) + "\n" for row in table)
    rows_or_reason(tmp_path / "cells.csv", text.encode("utf-8", "surrogatepass"))


@settings(quiet, max_examples=300)
@given(
    values=st.dictionaries(
        st.sampled_from(field_names()),
        JSON | st.sampled_from(["0", "-1", "nan", "1e400", "", "null", [], {}]),
        max_size=3,
    )
)
def test_any_values_give_a_config_or_a_refusal(values: dict[str, Any]) -> None:
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *path, last = name.split(".")
        place = nested
        for section in path:
            place = place.setdefault(section, {})
        place[last] = value
    try:
        config = from_values(nested)
    except ConfigError as error:
        assert any(name.rpartition(".")[2] in str(error) for name in values)
    else:
        assert Config.model_validate(json.loads(config.model_dump_json())) == config


@settings(quiet, max_examples=200)
@given(
    words=st.lists(
        st.text(max_size=12)
        | st.sampled_from(["--config", "batch.size=0", "--resume", "lora.targets=,", "--help="]),
        max_size=4,
    )
)
def test_any_command_line_gives_a_config_or_a_refusal(words: list[str]) -> None:
    try:
        parse(words)
    except ConfigError as error:
        assert str(error)
    except SystemExit as end:
        assert end.code == 0  # --help


DOCUMENTS = JSON.map(json.dumps) | st.text(max_size=40)


@settings(quiet, max_examples=100)
@given(content=st.binary(max_size=60) | DOCUMENTS.map(lambda text: text.encode("utf-8", "replace")))
def test_any_yaml_gives_a_config_or_a_refusal(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.yaml"
    path.write_bytes(content)
    try:
        parse(["--config", str(path)])
    except ConfigError as error:
        assert str(error)
