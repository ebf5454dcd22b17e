"""Kept rows that are damaged, strange or made at once are read or made again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kept_rows import folder_of, rows
from row_files import write
from transformers import PreTrainedTokenizerFast

from glassloop.config import Config
from glassloop.data import making, reading
from glassloop.data.dataset import Dataset
from glassloop.data.identity import key_of
from glassloop.data.reading import read_dataset
from glassloop.data.sources import find_files
from glassloop.data.stored import StoredRows, places_of, rows_with
from glassloop.disk.lock import hold

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
