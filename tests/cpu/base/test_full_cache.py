"""A cache without room: the field and the cure are named, and nothing half stays."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from loaded_bases import CPU, load
from safetensors import SafetensorError

from glassloop.base import host_pages
from glassloop.base.hashing import base_hash
from glassloop.base.source import resolve_source
from glassloop.base.streamed import load_streamed
from glassloop.config import ModelConfig
from glassloop.disk import cache

NO_ROOM = r"model\.cache_dir: the cache .* has no room \(File too large\): free space or raise"


def layers(folder: Path, cache_dir: Path) -> None:
    from glassloop.plan.support import groups_of

    model = ModelConfig(id=str(folder), cache_dir=str(cache_dir))
    load_streamed(model, groups_of, precision="bf16", device=CPU, first=contextlib.nullcontext)


@pytest.mark.parametrize("size", [400, 20_000], ids=["config", "weights"])
@pytest.mark.parametrize(("make", "kind"), [(load, "quantized"), (layers, "layers")])
def test_a_quota_that_is_full_is_told_with_the_field_and_leaves_nothing(
    make: Callable[[Path, Path], object], kind: str, size: int, tiny_llama: Path, tmp_path: Path,
    small_files_only: Callable[[int], None],
) -> None:  # fmt: skip
    small_files_only(size)
    with pytest.raises(ValueError, match=NO_ROOM):
        make(tiny_llama, tmp_path)
    small_files_only(resource.RLIM_INFINITY)
    assert list((tmp_path / kind).iterdir()) == []
    make(tiny_llama, tmp_path)
    assert len([path for path in (tmp_path / kind).iterdir() if path.name[0] != "."]) == 1


def test_hashes_that_find_no_room_are_computed_again(
    tiny_llama: Path, tmp_path: Path, small_files_only: Callable[[int], None]
) -> None:
    source = resolve_source(ModelConfig(id=str(tiny_llama), cache_dir=str(tmp_path)))
    small_files_only(10)
    first = base_hash(source, tmp_path / "file_hashes.json")
    assert list(tmp_path.iterdir()) == []
    small_files_only(resource.RLIM_INFINITY)
    assert base_hash(source, tmp_path / "file_hashes.json") == first
    (tmp_path / "file_hashes.json").write_text('["of another program"]')
    assert base_hash(source, tmp_path / "file_hashes.json") == first


def test_a_new_cache_without_room_for_its_tag_is_read_all_the_same(
    tmp_path: Path, small_files_only: Callable[[int], None]
) -> None:
    small_files_only(0)
    assert cache.cache_root(str(tmp_path / "made")).is_dir()


def test_a_copy_in_shared_memory_that_finds_no_room_does_not_stay(
    tmp_path: Path,
    small_files_only: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared, base = tmp_path / "shm", tmp_path / "base.bin"
    shared.mkdir()
    base.touch()
    monkeypatch.setattr(host_pages, "SHARED_MEMORY", shared)
    pages = torch.arange(200, dtype=torch.uint8).repeat(1000)
    small_files_only(1000)
    with pytest.raises(OSError, match="written"):
        host_pages.shared_copy(pages, base)
    assert list(shared.iterdir()) == []
    small_files_only(resource.RLIM_INFINITY)
    assert torch.equal(host_pages.shared_copy(pages, base), pages)


@pytest.mark.parametrize("error", [FileNotFoundError(2, "gone"), SafetensorError("bad header")])
def test_another_error_is_not_called_a_lack_of_room(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)), cache.published(tmp_path / "made"):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_writer_renames_meanwhile_is_no_fault_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".made.theirs").mkdir()

    def published_by_its_writer() -> float:  # after it was listed, before its age is read
        (tmp_path / ".made.theirs").rename(tmp_path / "theirs")
        return 0.0

    monkeypatch.setattr(cache.time, "time", published_by_its_writer)
    with cache.published(tmp_path / "made"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "theirs"]
