"""The header of a run: what a reader must know of rows and model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest


@pytest.mark.parametrize("positions", [24, 512])
def test_rows_longer_than_the_models_positions_are_counted_and_the_cure_named(
    run_of, tiny_llama: Path, tmp_path: Path, positions: int
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    values = json.loads(config.read_text()) | {"max_position_embeddings": positions}
    config.write_text(json.dumps(values))
    run = run_of(
        model={"id": str(tmp_path / "model"), "quantization": "none"},
        execution={"precision": "fp32"},
    )
    notes = [line for line in run.header if "positions" in line]
    lengths = [len(row) for row in run.batches.rows]
    run.close()
    if positions == 512:
        assert not notes
        return
    over = sum(length > 24 for length in lengths)
    assert over
    (note,) = notes
    assert (
        f"note: {over} rows of up to {max(lengths)} tokens, but the model has 24 positions" in note
    )
    assert "set data.max_tokens=24" in note
