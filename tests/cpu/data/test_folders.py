"""Folders, saved data sets and hub ids: which files are read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled
from row_files import answers, ids, pairs, write

from glassloop.config import DataConfig
from glassloop.data.folders import choose
from glassloop.data.sources import Loaded, load_examples


def rows_of(source: Path | str, **data: Any) -> Loaded:
    return load_examples(DataConfig(source=str(source), shuffle=False, **data), 0)


def test_a_folder_is_read_with_its_splits(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", pairs(3))
    write(tmp_path / "test.jsonl", pairs(1, "Else"))
    loaded = rows_of(tmp_path, heldout="test")
    assert ids(loaded.train) == ["train:0", "train:1", "train:2"]
    assert ids(loaded.heldout) == ["test:0"]
    assert "files read: train.jsonl" in loaded.notes


@pytest.mark.parametrize(
    ("names", "split", "want"),
    [
        (["a.csv", "b.csv"], "train", ["a.csv", "b.csv"]),
        (
            ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"],
            "test",
            ["data/test-00000-of-00001.parquet"],
        ),
        (["calls_train.csv", "calls_test.csv"], "train", ["calls_train.csv"]),
        (["train/x.json", "dev/x.json"], "validation", ["dev/x.json"]),
        (["train/test_1.json", "train/x.json"], "test", ["train/test_1.json"]),
        (
            ["extra-00000-of-00002.parquet", "extra-00001-of-00002.parquet"],
            "extra",
            ["extra-00000-of-00002.parquet", "extra-00001-of-00002.parquet"],
        ),
        (
            ["a.csv", "b.csv", "labels.json", "dataset_infos.json", ".git/x.csv"],
            "train",
            ["a.csv", "b.csv"],
        ),
        (["retrained.csv"], "train", ["retrained.csv"]),
    ],
)
def test_names_of_files_and_folders_tell_the_split(
    names: list[str], split: str, want: list[str]
) -> None:
    assert list(choose(names, None, None, split, "data.source = x").files) == want


def test_files_of_another_kind_are_named_and_not_read(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", pairs(2))
    write(tmp_path / "b.csv", pairs(2))
    (tmp_path / "c.json").write_text("{}")
    loaded = rows_of(tmp_path)
    assert len(loaded.train) == 4
    assert "files read: a.csv, b.csv; of another kind and not read: c.json" in loaded.notes


README = (
    "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: {}\n---\nText"
)


@pytest.mark.parametrize("pattern", ["rows/*.csv", "rows/a.csv", "'**/*.csv'", "rows", "'*/?.csv'"])
def test_a_readme_names_the_files_of_a_split(tmp_path: Path, pattern: str) -> None:
    write(tmp_path / "rows" / "a.csv", pairs(2))
    write(tmp_path / "b.jsonl", pairs(5))
    (tmp_path / "README.md").write_text(README.format(pattern))
    assert len(rows_of(tmp_path).train) == len(rows_of(tmp_path, config="en").train) == 2


@pytest.mark.parametrize("data_files", ["a.csv", "[a.csv]", "{train: a.csv, test: b.csv}"])
def test_every_form_of_data_files_is_read(tmp_path: Path, data_files: str) -> None:
    for name in ("a.csv", "b.csv"):
        write(tmp_path / name, pairs(2))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- data_files: {data_files}\n---\n")
    assert rows_of(tmp_path).notes[-1] == "files read: a.csv"


@pytest.mark.parametrize("path", ["../x.csv", "/etc/x.csv", "rows/../../x.csv", "https://a/x.csv"])
def test_a_readme_cannot_lead_outside_its_folder(tmp_path: Path, path: str) -> None:
    write(tmp_path / "x.csv", pairs(2))
    write(tmp_path / "data" / "a.csv", pairs(2))
    (tmp_path / "data" / "README.md").write_text(README.format(path))
    with pytest.raises(ValueError, match=r"data_files .*x\.csv, which lies outside the folder; on"):
        rows_of(tmp_path / "data")


def test_a_link_cannot_lead_outside_its_folder(tmp_path: Path) -> None:
    write(tmp_path / "x.csv", pairs(2))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.csv").symlink_to(tmp_path / "x.csv")
    with pytest.raises(ValueError, match=r"a\.csv leads to .*x\.csv, outside the folder"):
        rows_of(tmp_path / "data")
    assert len(rows_of(tmp_path / "data" / "a.csv").train) == 2  # named by the user


@pytest.mark.parametrize(
    ("readme", "data", "match"),
    [
        ("", {"split": "test"}, r"has no split test; it has train: set data\.split"),
        ("", {"split": "../x"}, r"data\.split = \.\./x: .* has splits such as train"),
        ("", {"config": "en"}, "has no configurations; leave data.config out"),
        (README.format("a.csv"), {"config": "de"}, "no such configuration; it has en"),
        (README.format("gone.csv"), {}, "names data_files gone.csv, none is there"),
        ("---\na: &a [x]\nb: [*a, *a]\n---\n", {}, "aliases could make it grow without end"),
        ("---\nconfigs: 5\n---\n", {}, "has configs = 5; correct it"),
        (
            "---\nconfigs:\n- {config_name: a, data_files: a.csv}\n"
            "- {config_name: b, data_files: a.csv}\n---\n",
            {},
            "has configurations a, b: choose one with data.config=NAME",
        ),
    ],
)
def test_a_folder_that_cannot_be_read_says_why(
    tmp_path: Path, readme: str, data: dict[str, Any], match: str
) -> None:
    write(tmp_path / "a.csv", pairs(2))
    (tmp_path / "README.md").write_text(readme)
    with pytest.raises(ValueError, match=match):
        rows_of(tmp_path, **data)


def test_an_empty_folder_names_the_endings_that_files_have(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no data file; one must end in \.csv, \.tsv"):
        rows_of(tmp_path)


# Several files


def test_files_of_a_pattern_and_a_list_follow_each_other_by_name(tmp_path: Path) -> None:
    write(tmp_path / "b.csv", pairs(2, "B"))
    write(tmp_path / "a.csv", pairs(1, "A"))
    for source in (f"{tmp_path}/*.csv", f"{tmp_path}/a.csv,{tmp_path}/b.csv"):
        loaded = rows_of(source)
        assert loaded.source == "2 files"
        asked = [example.turns[0].content for example in loaded.train]
        assert asked == ["A 0?", "B 0?", "B 1?"]


def test_a_fault_is_named_by_its_own_file_and_row(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", pairs(2))
    write(tmp_path / "b.jsonl", [*pairs(1), {"prompt": "x", "completion": 3}])
    with pytest.raises(ValueError, match=r"b\.jsonl, row 1: response = 3 is int"):
        rows_of(f"{tmp_path}/*.jsonl")


def test_tables_with_other_columns_are_not_read_together(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", pairs(2))
    write(tmp_path / "b.csv", [{"prompt": "x", "answer": "y"}])
    with pytest.raises(
        ValueError, match=r"b\.csv: it has columns prompt, answer, but .*a\.csv has"
    ):
        rows_of(f"{tmp_path}/*.csv")
    with pytest.raises(ValueError, match="no file matches"):
        rows_of(f"{tmp_path}/*.jsonl")


def test_a_part_of_a_split_is_taken_by_numbers_or_percent(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", pairs(10))
    assert ids(rows_of(tmp_path, split="train[:2]").train) == ["train[:2]:0", "train[:2]:1"]
    assert ids(rows_of(tmp_path, split="train[80%:]").train) == ["train[80%:]:8", "train[80%:]:9"]
    assert answers(rows_of(tmp_path, split="train[-1:]")) == ["Answer 9."]


# Saved by datasets


def test_a_data_set_saved_to_disk_is_read(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_list(pairs(3))
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "two")
    assert answers(rows_of(tmp_path / "one")) == ["Answer 0.", "Answer 1.", "Answer 2."]
    assert len(rows_of(tmp_path / "two", split="test").train) == 3
    with pytest.raises(ValueError, match="has no split dev; it has test, train"):
        rows_of(tmp_path / "two", split="dev")
    with pytest.raises(ValueError, match="is one split; leave"):
        rows_of(tmp_path / "one", split="test")


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ('{"_data_files": [{"filename": "../x.arrow"}]}', r"\.\./x\.arrow leads to .* outside the"),
        ('{"_data_files": 5}', "does not list its files as datasets' save_to_disk does"),
        ("[", "does not list its files"),
    ],
)
def test_a_saved_data_set_cannot_lead_outside(tmp_path: Path, state: str, match: str) -> None:
    write(tmp_path / "x.arrow", pairs(2))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text(state)
    with pytest.raises(ValueError, match=match):
        rows_of(tmp_path / "saved")


# The hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A hub whose files lie in tmp_path; returns what it was asked."""
    asked: list[tuple[Any, ...]] = []
    write(tmp_path / "train.csv", [{"prompt": "q", "completion": text} for text in ("NA", "007")])
    write(tmp_path / "test.csv", pairs(1))

    def info(_self: Any, repo: str, revision: str | None) -> Any:
        asked.append((repo, revision))
        names = [SimpleNamespace(rfilename=path.name) for path in tmp_path.iterdir()]
        return SimpleNamespace(sha="c" * 40, siblings=names)

    def download(repo: str, name: str, repo_type: str, revision: str) -> str:
        asked.append((repo, name, repo_type, revision))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_a_hub_id_gives_the_text_of_its_files_at_one_commit(hub: list[tuple[Any, ...]]) -> None:
    loaded = rows_of("who/what", revision="abc", heldout="test")
    assert answers(loaded) == ["NA", "007"]
    assert ids(loaded.heldout) == ["test:0"]
    assert ("who/what", "abc") in hub
    assert ("who/what", "train.csv", "dataset", "c" * 40) in hub
    assert len(rows_of("who/what:test").train) == len(rows_of("who/what", split="test").train) == 1
    with pytest.raises(ValueError, match="names train: keep one"):
        rows_of("who/what:train", split="test")


class OtherLibrarysError(Exception):
    """As an HTTP library's: neither an OSError nor one of the hub's own."""


@pytest.mark.parametrize("kind", [ConnectionError, OtherLibrarysError])
def test_what_the_hub_refuses_is_said_with_the_fields_to_look_at(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise kind("no way there")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    match = r"data\.source = who/what cannot be read: no way there .*data\.config, data\.split"
    with pytest.raises(ValueError, match=match):
        rows_of("who/what")


def test_a_file_that_the_hub_does_not_give_is_named(
    hub: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OtherLibrarysError("the line is down")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(ValueError, match=r"who/what: train\.csv was not fetched: the line is down"):
        rows_of("who/what")


@pytest.mark.parametrize("kind", [OfflineModeIsEnabled, OtherLibrarysError])
def test_without_network_the_hubs_own_cache_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    write(tmp_path / "train.jsonl", pairs(2))

    def offline(*_: Any, **__: Any) -> None:
        raise kind("offline")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    assert len(rows_of("who/what").train) == 2
