"""A rank's device has a number, whoever started the process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from glassloop.loop.replica import device_of

ROOT = Path(__file__).parents[3]


def test_a_card_that_no_launcher_numbered_is_the_current_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    asked = {"cuda": "cuda:1", "cuda:0": "cuda:0", "cpu:3": "cpu"}
    for given, found in asked.items():
        accelerator = SimpleNamespace(device=torch.device(given))
        assert device_of(accelerator) == torch.device(found)  # type: ignore[arg-type]


def test_nobody_else_asks_accelerate_for_the_device() -> None:
    files = [*(ROOT / "glassloop").rglob("*.py"), ROOT / "train_loop.py"]
    asking = [file for file in files if "accelerator.device" in file.read_text(encoding="utf-8")]
    assert asking == [ROOT / "glassloop/loop/replica.py"]
