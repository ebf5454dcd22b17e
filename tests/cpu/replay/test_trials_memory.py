"""Models of a replay come one after another: none lies beside the next."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from glassloop.replay import rerun, trials
from glassloop.replay.verdict import Trial


class Model:
    """Stands for a model on a card."""

    def __init__(self) -> None:
        self.replica = SimpleNamespace(device=torch.device("cpu"))


@pytest.mark.parametrize("fails", [False, True])
def test_each_trial_drops_its_model_before_the_next_is_built(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    built: list[weakref.ref[Any]] = []
    beside: list[int] = []

    def make_parts(*_: object, **__: object) -> Model:
        beside.append(sum(ref() is not None for ref in built))
        model = Model()
        built.append(weakref.ref(model))
        return model

    def attempt(name: str, _scene: object, parts: Model, _grad: object) -> Trial:
        assert parts is built[-1]()
        if fails:
            raise RuntimeError("Triton Error [CUDA]: out of memory")  # torch has another class
        return Trial(name)

    monkeypatch.setattr(trials, "make_parts", make_parts)
    monkeypatch.setattr(trials, "enter", lambda _scene, parts: parts)
    monkeypatch.setattr(trials, "_attempt", attempt)
    replica = SimpleNamespace(pad_id=0, plain_engine=SimpleNamespace(attention="sdpa"))
    scene: Any = SimpleNamespace(parts=SimpleNamespace(accelerator=None, replica=replica), rows=())
    config: Any = Config()
    found = list(trials._other_engines(scene, config, torch.zeros(1)))
    assert beside == [0, 0, 0] and len(found) == 3
    assert all(("out of memory" in one.note) == fails for one in found)
    replica.plain_engine.attention = "eager"  # a Gemma 2's, though its config has sdpa
    notes = {one.name: one.note for one in trials._other_engines(scene, config, torch.zeros(1))}
    assert notes[trials.EAGER] == "not tried: the run used it" and len(beside) == 5


class Config:
    """A run's config, of which a field is changed at a time."""

    def __init__(self) -> None:
        section = {"precision": "bf16", "engine": "fused", "attention": "sdpa"}
        self.execution: Any = SimpleNamespace(**section, model_copy=lambda update: update)
        self.model: Any = SimpleNamespace(**section, model_copy=lambda update: update)

    def model_copy(self, update: object) -> object:
        return update


def test_the_models_that_only_draw_numbers_are_freed_each(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(rerun, "make_parts", lambda *_, **__: told.append("built"))
    monkeypatch.setattr(rerun, "free_dropped", lambda _: told.append("freed"))
    monkeypatch.setattr(rerun, "rng_state", lambda _: {})
    config = SimpleNamespace(lora=SimpleNamespace(dropout=0.1))
    replica = SimpleNamespace(device=torch.device("cpu"), pad_id=0)
    parts: Any = SimpleNamespace(config=config, replica=replica)
    assert len(list(rerun._first_rng(parts, 3))) == 3
    assert told == ["built", "freed"] * 2
