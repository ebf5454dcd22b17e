"""The peer that offloads layers is that, or it fails."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from peer_models import PEERS, check_offloads, trainer_class


def test_axolotls_mixin_stands_before_trls_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    trl: Any = ModuleType("trl")
    trl.SFTTrainer = type("SFTTrainer", (), {})
    mixins: Any = ModuleType("axolotl.core.trainers.mixins")
    mixins.LayerOffloadingMixin = type("LayerOffloadingMixin", (), {})
    monkeypatch.setitem(sys.modules, "trl", trl)
    monkeypatch.setitem(sys.modules, "axolotl.core.trainers.mixins", mixins)
    made = trainer_class(PEERS["axolotl-offload"])
    names = [one.__name__ for one in made.__mro__]
    assert names[1:3] == ["LayerOffloadingMixin", "SFTTrainer"]
    assert trainer_class(PEERS["trl"]) is trl.SFTTrainer


def test_a_trainer_that_offloads_nothing_is_no_measurement() -> None:
    check_offloads(SimpleNamespace(_layer_offload_manager=SimpleNamespace(enabled=True)))
    for manager in (None, SimpleNamespace(enabled=False)):
        with pytest.raises(RuntimeError, match="would be TRL's trainer"):
            check_offloads(SimpleNamespace(_layer_offload_manager=manager))
    with pytest.raises(RuntimeError, match="would be TRL's trainer"):
        check_offloads(SimpleNamespace())
