"""Rows kept in mapped files are the rows of memory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import threading
from array import array
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from row_files import write
from transformers import PreTrainedTokenizerFast

from glassloop.config import Config, DataConfig, ModelConfig
from glassloop.data import making, reading
from glassloop.data.dataset import Dataset, summary
from glassloop.data.identity import key_of
from glassloop.data.reading import read_dataset
from glassloop.data.sources import find_files
from glassloop.data.stored import StoredRows, lengths_of, places_of, rows_with, supervised_of
from glassloop.disk.lock import hold

ODD = ["", "Ünïcode 🧨 naïve", "He said <s> and <|user|>.", "line\nbreak", "x" * 300]


def rows(count: int, **more: Any) -> list[dict[str, Any]]:
    """Questions of odd kinds: repeated, nearly alike, long, empty, with control tokens."""
    found = []
    for number in range(count):
        question = f"How many legs has animal {number % 17} of the {number // 23} herds here?"
        answer = ODD[number % 11] if number % 11 < len(ODD) else f"It has {number}."
        found.append({"question": question, "answer": answer, **more})
    return found


@pytest.fixture
def config_of(tmp_path: Path) -> Callable[..., Config]:
    def build(cells: list[dict[str, Any]] | None = None, **data: Any) -> Config:
        source = write(tmp_path / "rows.jsonl", cells or rows(200))
        values = {"source": source, "template": "chat", "max_tokens": 60, **data}
        model = ModelConfig(id="unused", cache_dir=str(tmp_path / "cache"))
        return Config(model=model, data=DataConfig(**values))

    return build


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Keep rows of any number, made in this process in chunks."""
    monkeypatch.setattr(reading, "FEW_BYTES", 0)
    monkeypatch.setattr(reading, "FEW_ROWS", 0)
    monkeypatch.setattr(making, "CHUNK", 7)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    monkeypatch.setattr(reading, "ordered", making.make)
    return monkeypatch


def folder_of(config: Config) -> Path:
    (folder,) = (Path(str(config.model.cache_dir)) / "rows").iterdir()
    return folder


def same(one: Dataset, other: Dataset, data: DataConfig) -> None:
    """Assert that two datasets say the same."""
    for here, there in ((one.train, other.train), (one.heldout, other.heldout)):
        assert list(here.rows) == list(there.rows)
        assert lengths_of(here.rows) == lengths_of(there.rows)
        assert supervised_of(here.rows) == supervised_of(there.rows)
        assert list(here.untouched_tokens) == list(there.untouched_tokens)
        assert (here.dropped, here.cut, here.faulty) == (there.dropped, there.cut, there.faulty)
        assert (here.facts, here.tokens) == (there.facts, there.tokens)
        count = min(len(here.rows), 3)
        assert tuple(here.examples[:count]) == tuple(there.examples[:count])
        assert len(here.examples) == len(there.examples)
    for name in {field.name for field in fields(one.loaded)} - {"train", "heldout"}:
        assert getattr(one.loaded, name) == getattr(other.loaded, name), name
    names = ("digest", "repeated", "heldout_repeated", "near_across")
    assert [getattr(one, name) for name in names] == [getattr(other, name) for name in names]
    mine, theirs = one.template, other.template
    assert (mine.name, mine.opens_think) == (theirs.name, theirs.opens_think)
    assert (mine.chat_template, mine.why) == (theirs.chat_template, theirs.why)
    assert summary(one, data) == summary(other, data)


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


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a byte": lambda folder: _flip(folder / "train.tokens"),
    "the end": lambda folder: os.truncate(folder / "train.tokens", 400),
    "a file": lambda folder: (folder / "train.ids").unlink(),
    "the manifest": lambda folder: (folder / "rows.json").write_text("[]"),
    "half the manifest": lambda folder: os.truncate(folder / "rows.json", 100),
    "numbers that do not fit": lambda folder: _sums(folder, "train.lengths"),
    "a link": lambda folder: _replaced(folder / "train.cut", os.symlink),
    "a FIFO": lambda folder: _replaced(folder / "rows.json", lambda _, path: os.mkfifo(path)),
    "a link for the folder": lambda folder: _replaced(folder, os.symlink),
}


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _sums(folder: Path, name: str) -> None:
    """A file whose sum is right and whose numbers are not."""
    lengths = array("i", (folder / name).read_bytes())
    lengths[0], lengths[1] = -1, lengths[0] + lengths[1] + 1
    data = lengths.tobytes()
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "rows.json").read_text())
    manifest["sums"][name] = [len(data), hashlib.sha256(data).hexdigest()]
    (folder / "rows.json").write_text(json.dumps(manifest))


def _replaced(path: Path, make: Callable[[Path, Path], None]) -> None:
    aside = path.with_name("aside")
    path.rename(aside)
    make(aside, path)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_or_strange_folder_is_made_again(
    damage: Callable[[Path], Any],
    config_of: Callable[..., Config],
    kept: pytest.MonkeyPatch,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    config = config_of(heldout=0.2, heldout_duplicates="drop")
    first = read_dataset(config, lambda: tiny_tokenizer)
    before = list(first.train.rows)
    folder = folder_of(config)
    damage(folder)
    with pytest.raises(ValueError, match=r"rows|train|heldout|aside|parts|lacks"):
        reading.open_rows(folder, folder.name)
    again = read_dataset(config, lambda: tiny_tokenizer)
    assert list(again.train.rows) == before
    assert isinstance(again.train.rows, StoredRows)
    shutil.rmtree(folder.parent)


def test_a_folder_that_cannot_be_written_is_said_and_rows_stay_in_memory(
    tmp_path: Path,
    config_of: Callable[..., Config],
    kept: pytest.MonkeyPatch,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    config = config_of()

    def full(order: making.Order) -> None:
        raise OSError(28, "No space left on device")

    kept.setattr(reading, "ordered", full)
    found = read_dataset(config, lambda: tiny_tokenizer)
    assert isinstance(found.train.rows, tuple)
    assert "No space left on device" in found.loaded.notes[-1]
    (tmp_path / "cache" / "rows").rmdir()
    (tmp_path / "cache" / "rows").write_text("no folder")
    found = read_dataset(config, lambda: tiny_tokenizer)
    assert isinstance(found.train.rows, tuple)
    assert "in memory" in found.loaded.notes[-1]


def test_two_runs_at_once_make_rows_once(
    config_of: Callable[..., Config],
    kept: pytest.MonkeyPatch,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    config = config_of()
    key = key_of(config.data, config.seed, find_files(config.data), tiny_tokenizer)
    parent = Path(str(config.model.cache_dir)) / "rows"
    lock = hold(parent / f"{key}.making")  # another run makes them
    made: list[making.Order] = []
    kept.setattr(reading, "ordered", lambda order: (made.append(order), making.make(order)))
    kept.setattr(reading, "POLL_S", 0.01)
    found: list[Dataset] = []
    waiting = threading.Thread(
        target=lambda: found.append(read_dataset(config, lambda: tiny_tokenizer))
    )
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    assert not made
    files = find_files(config.data)
    with reading.published(parent / key) as folder:
        making.make(making.Order(config.data, config.seed, files, tiny_tokenizer, folder, key, 5))
    waiting.join(20)
    assert not waiting.is_alive()
    lock.release()
    assert not made
    assert isinstance(found[0].train.rows, StoredRows)
    assert sorted(one.name for one in parent.iterdir()) == [key]


def test_data_that_change_while_they_are_read_are_refused(
    config_of: Callable[..., Config],
    kept: pytest.MonkeyPatch,
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    config = config_of()
    real = making.load_examples

    def changing(*given: Any) -> Any:
        write(tmp_path / "rows.jsonl", rows(190))
        return real(*given)

    kept.setattr(making, "load_examples", changing)
    with pytest.raises(ValueError, match="changed while they were read"):
        read_dataset(config, lambda: tiny_tokenizer)


def test_stored_rows_answer_as_a_tuple_does(
    config_of: Callable[..., Config],
    kept: pytest.MonkeyPatch,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    stored = read_dataset(config_of(), lambda: tiny_tokenizer).train.rows
    plain = tuple(stored)
    assert stored[-1] == plain[-1]
    assert stored[3:9:2] == plain[3:9:2]
    assert stored[5000:] == ()
    with pytest.raises(IndexError):
        stored[len(plain)]
    assert places_of(stored) == places_of(plain)
    highest = max(max(row.input_ids) for row in plain)
    for least in (0, highest, highest + 1):
        assert rows_with(stored, least) == rows_with(plain, least)
