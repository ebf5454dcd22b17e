"""A base that cannot stream is dropped before another form of it is loaded."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from glassloop.base.layer_file import NotStreamable
from glassloop.config import ModelConfig
from glassloop.engines import build


class Base:
    """Stands for layers that were brought to a card."""


def test_what_a_failed_try_brought_is_gone_when_the_base_is_loaded_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    brought: list[weakref.ref[Any]] = []
    freed: list[torch.device] = []

    def load_streamed(*_: object, **__: object) -> None:
        layers = Base()
        brought.append(weakref.ref(layers))
        raise NotStreamable("model.extra has no place in the model")

    def load_base(*_: object, **__: object) -> tuple[str, str]:
        assert brought[0]() is None, "both forms of the base lie on the card"
        assert len(freed) == 1
        return "base", "report"

    monkeypatch.setattr(build, "load_streamed", load_streamed)
    monkeypatch.setattr(build, "load_base", load_base)
    monkeypatch.setattr(build, "free_dropped", freed.append)
    shared = {"device": torch.device("cpu")}
    model = ModelConfig(id="some/model", quantization="nf4")
    assert build._load(model, "fused", "gpu", None, shared) == ("base", "report", None)
