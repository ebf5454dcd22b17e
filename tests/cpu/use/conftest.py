"""One finished run for this folder; a test that changes it copies it."""

from __future__ import annotations

from pathlib import Path

import pytest
from trained_runs import finished_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    return finished_run(
        tmp_path_factory.mktemp("finished"), tiny_llama, record={"capture_updates": (2,)}
    )
