"""Rows kept in mapped files are the rows of memory."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kept_rows import folder_of, rows, same
from row_files import write
from transformers import PreTrainedTokenizerFast

from glassloop.config import Config, DataConfig
from glassloop.data import making, reading
from glassloop.data.identity import key_of
from glassloop.data.reading import read_dataset
from glassloop.data.sources import find_files
from glassloop.data.stored import StoredRows

KINDS: dict[str, dict[str, Any]] = {
    "all rows": {},
    "in the source's order": {"shuffle": False},
    "few of them": {"rows": 31},
    "long ones cut": {"too_long": "cut", "max_tokens": 58},
    "some held out": {"heldout": 0.3, "heldout_duplicates": "drop"},
    "a text that answers may spell": {"answer_tokens": ("<|user|>",), "labels": "everything"},
    "another template": {"template": "instruct", "max_tokens": 400},
}


@pytest.mark.parametrize("data", KINDS.values(), ids=KINDS)
def test_kept_rows_are_the_rows_of_memory(
    data: dict[str, Any],
    config_of: Callable[..., Config],
    kept: pytest.MonkeyPatch,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    config = config_of(**data)
    found = read_dataset(config, lambda: tiny_tokenizer)
    assert isinstance(found.train.rows, StoredRows)
    kept.setattr(reading, "FEW_BYTES", 10**9)
    same(read_dataset(config, lambda: tiny_tokenizer), found, config.data)


def test_rows_of_a_mix_with_reasoning_tools_and_faults_are_the_same(
    tmp_path: Path,
    config_of: Callable[..., Config],
    kept: pytest.MonkeyPatch,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    said = {"role": "assistant", "content": "four"}
    asked = {"role": "user", "content": "how many?"}
    call = {"function": {"name": "count", "arguments": {}}}
    talks = [
        [{"role": "system", "content": "Be brief."}, asked, said],
        [asked, said, asked, said | {"reasoning_content": "two and two"}],
        [asked, said | {"content": "", "tool_calls": [call]}],
    ]
    other = write(tmp_path / "talks.jsonl", [{"messages": talks[i % 3]} for i in range(20)])
    more = {"source": other, "weight": 2.5}
    config = config_of(
        mix=({"source": write(tmp_path / "a.csv", rows(40))}, more), on_bad_row="skip", rows=None
    )
    found = read_dataset(config, lambda: tiny_tokenizer)
    assert isinstance(found.train.rows, StoredRows)
    assert found.train.faulty
    assert any("+" in row.row_id for row in found.train.rows)
    kept.setattr(reading, "FEW_BYTES", 10**9)
    same(read_dataset(config, lambda: tiny_tokenizer), found, config.data)


def test_many_rows_are_made_by_processes_of_their_own(
    config_of: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    config = config_of(rows(3 * making.CHUNK // 2), heldout=0.01, heldout_duplicates="drop")
    in_memory = read_dataset(config, lambda: tiny_tokenizer)
    monkeypatch.setattr(reading, "FEW_BYTES", 0)
    found = read_dataset(config, lambda: tiny_tokenizer)
    assert isinstance(found.train.rows, StoredRows)
    same(in_memory, found, config.data)
    assert stat.S_IMODE(folder_of(config).stat().st_mode) == 0o755
    monkeypatch.setattr(reading, "ordered", None)  # a second time nothing is made
    same(in_memory, read_dataset(config, lambda: tiny_tokenizer), config.data)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "all too long": ({"max_tokens": 8}, r"data\.max_tokens = 8"),
    "a column that is not there": ({"columns": {"question": "q"}}, "no such column"),
    "faults of the template": (
        {"source": "talks.jsonl"},
        "2 of 3 rows cannot train .*2 tool calls",
    ),
}


@pytest.mark.parametrize(("data", "said"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_of_the_process_is_the_refusal_of_memory(
    data: dict[str, Any],
    said: str,
    tmp_path: Path,
    config_of: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    asked = {"role": "user", "content": "how many?"}
    talks = [[asked, call], [asked, {"role": "assistant", "content": "four"}], [asked, call]]
    write(tmp_path / "talks.jsonl", [{"messages": talk} for talk in talks])
    monkeypatch.chdir(tmp_path)
    config = config_of(rows(30), **data)
    with pytest.raises(ValueError, match=said) as in_memory:
        read_dataset(config, lambda: tiny_tokenizer)
    monkeypatch.setattr(reading, "FEW_BYTES", 0)
    with pytest.raises(ValueError, match=said) as refused:
        read_dataset(config, lambda: tiny_tokenizer)
    assert str(refused.value) == str(in_memory.value)
    assert list((Path(str(config.model.cache_dir)) / "rows").iterdir()) == []


def test_whatever_decides_rows_changes_their_key(
    config_of: Callable[..., Config], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = config_of()

    def key(data: DataConfig, seed: int = 0, tokenizer: Any = tiny_tokenizer) -> str:
        return key_of(data, seed, find_files(data), tokenizer)

    first = key(config.data)
    assert first == key(config.data)
    changed = {"template": "instruct", "max_tokens": 61, "system": "Be brief."}
    keys = {key(config.data.model_copy(update={name: value})) for name, value in changed.items()}
    other = type(tiny_tokenizer)(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<s>", bos_token="<s>"
    )
    keys |= {key(config.data, 1), key(config.data, tokenizer=other)}
    os.utime(config.data.source, (0, 0))
    assert first == key(config.data)
    write(tmp_path / "rows.jsonl", rows(201))
    assert len({first, key(config.data), *keys}) == len(changed) + 4
