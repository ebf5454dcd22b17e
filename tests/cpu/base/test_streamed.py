"""Loading a base over its file of layers: what is given back, and what is forgotten."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from glassloop.base import streamed
from glassloop.base.host_pages import HostPages
from glassloop.base.source import BaseError
from glassloop.config import ModelConfig
from glassloop.plan.support import groups_of


def load(folder: Path, cache: Path, spare_bytes: int | None = None) -> None:
    model = ModelConfig(id=str(folder), quantization="nf4", cache_dir=str(cache))
    streamed.load_streamed(
        model,
        groups_of,
        precision="fp32",
        device=torch.device("cpu"),
        first=nullcontext,
        spare_bytes=spare_bytes,
    )


def test_memory_is_given_back_before_what_is_free_is_counted(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model that a new file was checked with, and what torch keeps of earlier ones."""
    dropped: list[torch.device] = []
    monkeypatch.setattr(streamed, "free_dropped", dropped.append)
    load(tiny_llama, tmp_path)
    assert len(dropped) == 1  # the file was made
    load(tiny_llama, tmp_path)
    assert len(dropped) == 1  # nothing was computed
    load(tiny_llama, tmp_path, spare_bytes=0)
    assert len(dropped) == 2  # another model may have been here


def test_a_base_that_is_not_as_it_was_made_loses_its_copy_in_shared_memory(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(tiny_llama, tmp_path)
    forgotten: list[Path] = []
    monkeypatch.setattr(HostPages, "forget_copy", lambda self: forgotten.append(self.file.folder))
    monkeypatch.setattr(streamed, "base_checksum", lambda _: 0)
    with pytest.raises(BaseError, match="checksum 0"):
        load(tiny_llama, tmp_path)
    (folder,) = forgotten
    assert folder.parent == tmp_path / "layers"
