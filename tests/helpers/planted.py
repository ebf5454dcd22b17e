"""Runs on one rank with a planted fault, for tests of replay."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from glassloop.config.arguments import from_values
from glassloop.data.rows import Row
from glassloop.loop.build import build_run
from glassloop.loop.run import Run
from train_loop import update_once

ROWS, UPDATES = (
    8,
    4,
)  # every window holds all rows; the fault is in update 4, the healthy capsule is of update 2


def spoiled_base(
    model: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]
) -> Path:
    """A copy of a model's folder with `change` made to its weights."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def sure_base(model: Path, folder: Path) -> Path:
    """A model that is sure of what comes next.

    Its own continuations cost it little, others a lot.
    """

    def sharpen(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] *= 20

    return spoiled_base(model, folder, sharpen)


@torch.no_grad()
def continuations(
    model: Path, *, worst: bool = False, rows: int = ROWS, start: int = 40
) -> tuple[Row, ...]:
    """Rows of 20 tokens, each the model's likeliest next one.

    `worst`: the unlikeliest.
    """
    hf = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    made = []
    for index in range(rows):
        ids = [1, start + 3 * index, start + 3 * index + 1, start + 3 * index + 2]
        while len(ids) < 20:
            logits = hf(torch.tensor([ids])).logits[0, -1]
            ids.append(int(logits.argmin() if worst else logits.argmax()))
        made.append(
            Row(f"row:{'bad' if worst else index}", tuple(ids), (False,) * 4 + (True,) * 16)
        )
    return tuple(made)


def write_lines(path: Path, rows: int) -> Path:
    """A data file of `rows` rows, which the built run replaces."""
    path.write_text('{"prompt": "who is it", "completion": "nobody"}\n' * rows)
    return path


def planted_run(
    folder: Path,
    model: Path,
    rows: tuple[Row, ...],
    spoil: Callable[[Run], None] | None = None,
    *,
    updates: int = UPDATES,
    **sections: dict,
) -> Path:
    """Train `updates` updates and return the run's folder.

    `spoil` changes the run before the last update.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = write_lines(folder / "rows.jsonl", len(rows))
    values = {
        "model": {"id": str(model), "quantization": "none"},
        "lora": {"r": 4, "alpha": 8},
        "data": {"source": str(source), "template": "chat", "max_tokens": 96},
        "batch": {"size": 2, "accumulation": 4},
        "schedule": {"updates": 30, "warmup_updates": 1},
        "optimizer": {"lr": 1e-4},
        "execution": {"precision": "fp32", "checkpointing": False},
        "evaluation": {"samples": 0},
        "stability": {"on_nonfinite": "skip"},
        "record": {"capture_updates": [updates]},
        "run": {"dir": str(folder), "name": "run"},
    }
    for section, fields in sections.items():
        values[section] = {**values.get(section, {}), **fields}
    run = build_run(from_values(values))
    run.batches = replace(run.batches, rows=rows)
    run.contract = None  # the plan knows the file's rows
    for u in range(1, updates + 1):
        if u == updates and spoil is not None:
            spoil(run)
        outcome = update_once(run, u)
        assert outcome is not None
        run.tell(outcome)
    run.close_observers()
    return run.folder
