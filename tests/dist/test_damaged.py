"""One rank's copy of a checkpoint is damaged: no rank trains; the message names rank and file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import HERE, launch, write_rows


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("damaged")
    rows = write_rows(folder / "rows.jsonl", 21)
    output = launch(HERE / "damaged.py", str(folder), str(tiny_llama), str(rows), expect=1)
    return {**json.loads((folder / "damaged.json").read_text()), "output": output}


def test_each_file_that_one_rank_finds_damaged_is_refused_by_both_which_name_rank_and_file(
    damaged: dict[str, Any],
) -> None:
    assert len(damaged["each file"]) == 5
    for name, said in damaged["each file"].items():
        assert f"{name} is corrupt or cut short" in said[0]
        assert "rank 1" in said[0]
        assert f"cannot be restored on rank 1: {name} is corrupt or cut short" in said[1]


def test_ranks_that_would_go_on_from_different_checkpoints_do_not(damaged: dict[str, Any]) -> None:
    first, second = damaged["passed over by one"]
    assert first == second
    assert "ranks hold different checkpoints to resume from (rank 0: update_000004, sums " in first
    assert "rank 1: update_000002, sums " in first


def test_what_another_rank_refuses_is_printed_once(damaged: dict[str, Any]) -> None:
    assert damaged["output"].count("refused: ") == 1
    assert "rank 1: ValueError: checkpoint" in damaged["output"]
    assert "optimizer.safetensors is corrupt or cut short" in damaged["output"]
    assert (
        "Traceback"
        not in damaged["output"]
        .partition("ChildFailedError")[0]
        .partition("refused: ")[2]
        .partition("\n")[0]
    )
