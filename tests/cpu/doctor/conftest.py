"""A machine without logins of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without cards, logins or launcher settings."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "HF_", "HUGGING_FACE", "WANDB", "CUDA_VISIBLE")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("glassloop.predict.hardware.gpus_present", lambda: ())
    monkeypatch.chdir(tmp_path)
    return tmp_path
