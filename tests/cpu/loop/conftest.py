"""A short run that others resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from train_loop import update_once


@pytest.fixture
def begun(run_of) -> Path:
    """A run that has done two updates in fp32 and saved after the second."""
    run = run_of(
        data={"heldout": 0.2},
        schedule={"updates": 6, "warmup_updates": 1},
        execution={"precision": "fp32", "checkpointing": False},
    )
    for update in (1, 2):
        run.tell(update_once(run, update))
    run.save(2)
    run.close_observers()
    return run.folder
