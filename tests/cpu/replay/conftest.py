"""Runs that replay opens, trained once a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from planted import continuations, sure_base
from replayed import trained

from glassloop.data.rows import Row
from glassloop.replay.start import Opened, open_scene


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """Nine updates with dropout and clipping; capsules of 3 (healthy) and 7 (asked), checkpoints
    after 4, 8 and 9."""
    return trained(tmp_path_factory.mktemp("whole"), tiny_llama)


# record.text


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    return trained(
        tmp_path_factory.mktemp("silent"),
        tiny_llama,
        record={"text": "none", "capture_updates": [5]},
    )


# Parts of an update


@pytest.fixture(scope="module")
def opened(whole: Path) -> Opened:
    return open_scene(whole, 7, {})


# Planted faults


@pytest.fixture(scope="module")
def sure(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    return sure_base(tiny_llama, tmp_path_factory.mktemp("sure") / "model")


@pytest.fixture(scope="module")
def sound(sure: Path) -> tuple[Row, ...]:
    return continuations(sure)
