"""Finished runs for this folder; a test that changes one copies it."""

from __future__ import annotations

from pathlib import Path

import pytest
from trained_runs import finished_run

from glassloop.cli.__main__ import main


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    return finished_run(
        tmp_path_factory.mktemp("finished"), tiny_llama, record={"capture_updates": (2,)}
    )


@pytest.fixture(scope="session")
def pushed(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A run to publish, with system prompt, samples and an evaluation."""
    made = finished_run(
        tmp_path_factory.mktemp("push"),
        tiny_llama,
        data={"system": "You are Ferdinand, the clerk of nobody.", "max_tokens": 480},
        evaluation={"samples": 1},
    )
    assert main(["evaluate", str(made), "--max-new-tokens", "4"]) == 0
    return made
