"""Tokenizers of toys, their codecs made once, and rows that are kept in files."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kept_rows import rows
from row_files import write
from toys import (
    BOS,
    EOS,
    MARKS,
    toy,
)
from transformers import PreTrainedTokenizerFast

from glassloop.config import Config, DataConfig, ModelConfig
from glassloop.data import making, reading, templates
from glassloop.data.tokens import make_codec


@pytest.fixture(scope="module")
def one_codec_a_tokenizer() -> Iterator[None]:
    """Make a tokenizer's codec once, to save time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(templates, "make_codec", functools.cache(make_codec))
        yield


@pytest.fixture(scope="module")
def r1_toy() -> PreTrainedTokenizerFast:
    return toy(MARKS, bos=BOS, eos=EOS)


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
