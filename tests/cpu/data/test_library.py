"""Folders and hub ids of kinds that datasets.load_dataset reads."""

from __future__ import annotations

import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest

from glassloop.config import DataConfig
from glassloop.data.sources import Loaded, load_examples


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.mktemp("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)


def rows_of(source: Path | str, **data: Any) -> Loaded:
    return load_examples(DataConfig(source=str(source), shuffle=False, **data), 0)


def texts(rows: Any) -> list[str]:
    return [turn.content for row in rows for turn in row.turns]


def test_a_folder_of_text_files_is_read_line_by_line(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("A first line.\nNA\n007\n")
    (tmp_path / "test.txt").write_text("A line apart.\n")
    loaded = rows_of(tmp_path, heldout="test")
    assert texts(loaded.train) == ["A first line.", "NA", "007"]
    assert texts(loaded.heldout) == ["A line apart."]
    assert any("read by datasets.load_dataset: test.txt, train.txt" in n for n in loaded.notes)
    assert texts(rows_of(tmp_path, split="train[1:]").train) == ["NA", "007"]


def test_a_kind_that_glassloop_reads_is_not_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("was called"))
    (tmp_path / "train.csv").write_text("question,answer\nWhat?,007\n")
    (tmp_path / "notes.txt").write_text("a note\n")
    assert texts(rows_of(tmp_path).train)[-1] == "007"


def test_a_hub_id_is_loaded_at_the_commit_that_was_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.txt").write_text("From the hub.\n")
    names = [SimpleNamespace(rfilename="train.txt")]
    found = SimpleNamespace(sha="c" * 40, siblings=names)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: found)
    asked = []
    real = datasets.load_dataset

    def load(place: str, **words: Any) -> Any:
        asked.append((place, words))
        return real(str(tmp_path), name=words["name"], split=words["split"])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert texts(rows_of("who/what", revision="abc").train) == ["From the hub."]
    assert asked == [("who/what", {"name": None, "split": "train", "revision": "c" * 40})]


def test_what_it_cannot_read_is_refused_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "rows.strange").write_text("x")
    match = r"data\.source = .*must end in .*No \(supported\) data files.*NotFoundError\)$"
    with pytest.raises(ValueError, match=match):
        rows_of(tmp_path)
    (tmp_path / "train.txt").write_text("A line.\n")
    with pytest.raises(ValueError, match='Unknown split "other"'):
        rows_of(tmp_path, split="other")


def test_an_archive_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.writestr("train.txt", "A line.\n")
    with pytest.raises(ValueError, match=r"train\.zip may hold any amount of data: unpack it"):
        rows_of(tmp_path)


def test_neither_a_link_nor_a_readme_leads_outside(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir(), inside.mkdir()
    (outside / "train.txt").write_text("A secret.\n")
    (inside / "train.txt").symlink_to(outside / "train.txt")
    with pytest.raises(ValueError, match="outside the folder"):
        rows_of(inside)
    (inside / "train.txt").unlink()
    (inside / "train.txt").write_text("A line.\n")
    for named in ("data_files: ../outside/*.txt", "data_dir: ../outside", "data_files: http://x/a"):
        (inside / "README.md").write_text(f"---\nconfigs:\n- config_name: a\n  {named}\n---\n")
        with pytest.raises(ValueError, match="outside the folder"):
            rows_of(inside)


def test_the_limit_counts_what_it_made(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("A line that is not short.\n" * 4000)
    with pytest.raises(ValueError, match=r"data\.max_gib"):
        rows_of(tmp_path, max_gib=1e-5)
