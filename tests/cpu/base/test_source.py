"""Sources of a base: local folders, hub commits, the cache of copies."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import PreTrainedModel

from glassloop.base import hashing
from glassloop.base.hashing import base_hash
from glassloop.base.quantised import LoadReport, load_base
from glassloop.base.source import resolve_source
from glassloop.config import ModelConfig
from glassloop.disk import cache

CPU = torch.device("cpu")
COMMIT = "c0ffee" * 6 + "abcd"


def load(
    folder: Path | str, cache_dir: Path, *, precision: str = "bf16", **model: object
) -> tuple[PreTrainedModel, LoadReport]:
    config = ModelConfig(id=str(folder), cache_dir=str(cache_dir), **model)  # type: ignore[arg-type]
    return load_base(config, precision=precision, device=CPU, first=contextlib.nullcontext)


# --- the cache's folders


def test_cache_is_the_field_else_the_variable_else_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GLASSLOOP_CACHE", str(tmp_path / "variable"))
    assert cache.cache_root(str(tmp_path / "field")) == tmp_path / "field"
    assert cache.cache_root(None) == tmp_path / "variable"
    monkeypatch.delenv("GLASSLOOP_CACHE")
    assert cache.cache_root(None) == tmp_path / ".cache" / "glassloop"
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"model.cache_dir: the cache .*file/x cannot be written"):
        cache.cache_root(str(tmp_path / "file" / "x"))


def test_two_writers_publish_one_whole_folder(tmp_path: Path) -> None:
    barrier = threading.Barrier(2)
    failures: list[BaseException] = []

    def write(content: str) -> None:
        try:
            with cache.published(tmp_path / "made") as temporary:
                for name in "ab":
                    (temporary / name).write_text(content)
                barrier.wait(10)
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(content,)) for content in ("one", "two")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert failures == []
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert (tmp_path / "made" / "a").read_text() == (tmp_path / "made" / "b").read_text()
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o755


def test_what_dead_writers_left_is_cleared_away_in_time(tmp_path: Path) -> None:
    for name, age_s in (
        (".made.old", 2 * cache.ABANDONED_S),
        (".made.young", 60.0),
        (".other.old", 2 * cache.ABANDONED_S),
    ):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age_s, time.time() - age_s))
    with cache.published(tmp_path / "made"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {".made.young", ".other.old", "made"}


# --- hashes of local folders


def test_local_base_is_hashed_once_and_again_when_it_changes(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, memo = shutil.copytree(tiny_llama, tmp_path / "base"), tmp_path / "memo.json"
    source = resolve_source(ModelConfig(id=str(folder)))
    read = []
    real = hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda handle, kind: read.append(handle.name) or real(handle, kind)
    )
    first = base_hash(source, memo)
    assert {Path(name).name for name in read} == {"config.json", "model.safetensors"}
    assert base_hash(source, memo) == first
    assert len(read) == 2
    memo.write_text("{torn")
    assert base_hash(source, memo) == first
    assert len(read) == 4
    weights = folder / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert base_hash(source, memo) != first
    assert len(read) == 5
    (folder / "tokenizer.json").write_text("{}")
    changed = base_hash(source, memo)
    moved = Path(shutil.move(folder, tmp_path / "moved"))
    assert base_hash(resolve_source(ModelConfig(id=str(moved))), memo) == changed, (
        "the folder's name is no part of it"
    )


def test_safetensors_are_preferred_to_bin(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no weights \(\*.safetensors or \*.bin\)"):
        hashing.base_files(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert [file.name for file in hashing.base_files(tmp_path)] == [
        "config.json",
        "pytorch_model.bin",
    ]
    (tmp_path / "model.safetensors").touch()
    assert [file.name for file in hashing.base_files(tmp_path)] == [
        "config.json",
        "model.safetensors",
    ]


# --- the hub


@pytest.fixture
def hub(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds owner/tiny at one commit.

    It is laid out as huggingface_hub does.
    """
    root = tmp_path / "hub"
    repo = root / "models--owner--tiny"
    shutil.copytree(tiny_llama, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    return root


def answer(monkeypatch: pytest.MonkeyPatch, reply: object) -> list[str]:
    """Let the hub give this commit, or raise this error.

    Returns the revisions that were asked for.
    """
    asked: list[str] = []

    def model_info(self: HfApi, repo_id: str, *, revision: str, timeout: float) -> SimpleNamespace:
        asked.append(revision)
        if isinstance(reply, BaseException):
            raise reply
        return SimpleNamespace(sha=reply)

    monkeypatch.setattr(HfApi, "model_info", model_info)
    return asked


def test_branch_becomes_a_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch, COMMIT)
    source = resolve_source(ModelConfig(id="owner/tiny", revision="v1"))
    assert (source.name, source.path, source.revision, source.commit, source.folder) == (
        "owner/tiny",
        "owner/tiny",
        COMMIT,
        COMMIT,
        None,
    )
    resolve_source(ModelConfig(id="owner/tiny"))
    assert asked == ["v1", "main"]


def test_downloaded_copy_serves_while_the_hub_is_out_of_reach(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, ConnectionError("no route"))
    source = resolve_source(ModelConfig(id="owner/tiny"))
    assert (source.name, source.commit, source.folder) == (
        "owner/tiny",
        COMMIT,
        hub / "models--owner--tiny" / "snapshots" / COMMIT,
    )
    _, report = load("owner/tiny", tmp_path / "cache")
    assert (report.name, report.commit) == ("owner/tiny", COMMIT)
    assert report.notes == (
        f"the hub cannot be reached: using the downloaded copy of owner/tiny, commit {COMMIT}",
    )
    with pytest.raises(
        ValueError,
        match=r"model.id = owner/other \(revision main\) is not on this machine, .*no route",
    ):
        resolve_source(ModelConfig(id="owner/other"))
    with pytest.raises(
        ValueError, match=r"model.id = owner/tiny \(revision v2\) is not on this machine"
    ):
        resolve_source(ModelConfig(id="owner/tiny", revision="v2"))


def test_quantised_copy_is_the_same_with_and_without_the_hub(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once it is there, the original weights are not needed."""
    answer(monkeypatch, ConnectionError("no route"))
    made = load("owner/tiny", tmp_path / "cache")[1]
    (hub / "models--owner--tiny" / "snapshots" / COMMIT / "model.safetensors").unlink()
    assert load("owner/tiny", tmp_path / "cache")[1].from_cache
    answer(monkeypatch, COMMIT)
    source = resolve_source(ModelConfig(id="owner/tiny"))
    assert base_hash(source, tmp_path / "memo.json") == made.base_hash
    answer(monkeypatch, COMMIT[::-1])
    assert (
        base_hash(resolve_source(ModelConfig(id="owner/tiny")), tmp_path / "memo.json")
        != made.base_hash
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RepositoryNotFoundError,
            r"model.id = owner/tiny is neither a folder nor a model on the hub: check the spelling",
        ),
        (
            RevisionNotFoundError,
            r"model.revision = v1 does not exist in owner/tiny: give a commit, tag or branch",
        ),
        (GatedRepoError, r"model.id = owner/tiny is gated: accept its licence .*hf auth login"),
    ],
)
def test_hub_errors_name_the_field(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception], message: str
) -> None:
    answer(monkeypatch, error.__new__(error))
    with pytest.raises(ValueError, match=message):
        resolve_source(ModelConfig(id="owner/tiny", revision="v1"))


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("./nowhere", None, r"model.id = ./nowhere is no folder on this machine"),
        ("/a/b/c", None, r"model.id = /a/b/c is no folder"),
        ("{folder}", "main", r"model.revision = main means nothing for the local folder"),
        ("{empty}", None, r"is a folder without config.json"),
    ],
)
def test_local_folders_that_cannot_be_are_refused(
    tiny_llama: Path, tmp_path: Path, name: str, revision: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_source(
            ModelConfig(id=name.format(folder=tiny_llama, empty=tmp_path), revision=revision)
        )


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_clone_without_its_large_files_is_told_from_damage(
    tiny_llama: Path, tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "clone")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (folder / name).write_text(pointer)
    with pytest.raises(ValueError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        resolve_source(ModelConfig(id=str(folder)))


def test_a_file_whose_time_was_put_back_is_hashed_again(tiny_llama: Path, tmp_path: Path) -> None:
    folder, memo = shutil.copytree(tiny_llama, tmp_path / "base"), tmp_path / "memo.json"
    source = resolve_source(ModelConfig(id=str(folder)))
    first, weights = base_hash(source, memo), folder / "model.safetensors"
    before = weights.stat()
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = base_hash(source, memo)
    assert changed != first
    raw[-1] ^= 1
    (tmp_path / "other").write_bytes(raw)
    os.utime(tmp_path / "other", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(tmp_path / "other", weights)
    assert base_hash(source, memo) == first
    assert len(json.loads(memo.read_text())) == 2, "a file is remembered once"


def test_a_memo_of_hashes_can_be_read_by_the_next_user(tiny_llama: Path, tmp_path: Path) -> None:
    memo = tmp_path / "file_hashes.json"
    source = resolve_source(ModelConfig(id=str(tiny_llama)))
    base_hash(source, memo)
    assert memo.stat().st_mode & 0o777 == 0o644


def test_a_cache_that_cannot_be_written_is_read_and_costs_the_memo_alone(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another user's cache is, or a read-only one."""
    made = load(tiny_llama, tmp_path)[1].checksum

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "file_hashes.json").unlink()
    monkeypatch.setattr(cache.tempfile, "mkdtemp", refuse)
    monkeypatch.setattr(hashing.tempfile, "mkstemp", refuse)
    assert load(tiny_llama, tmp_path)[1].checksum == made
    with pytest.raises(
        ValueError, match=r"cannot be written \(Permission denied\): set model.cache"
    ):
        load(tiny_llama, tmp_path / "other")


def test_a_home_that_cannot_be_written_is_named_with_the_cure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GLASSLOOP_CACHE")
    monkeypatch.setenv("HOME", "/dev/null")
    with pytest.raises(
        ValueError, match=r"cache /dev/null/.cache/glassloop cannot be written.*GLAS"
    ):
        cache.cache_root(None)
