"""One update, many ways to carry it out: the equivalence class. Each member trains the same rows and leaves its gradient and weights.

`python members.py FOLDER MODEL ROWS` runs the one-rank members; the same under `accelerate launch` with two ranks runs the two-rank ones.
Rank 0 writes FOLDER/<member>.safetensors with `grad` (g of update 1, at equal weights), and `sgd` and `adamw_8bit` (change of the
adapters after UPDATES updates).
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from glassloop.arguments import from_values
from glassloop.build import build_run
from glassloop.dist import leave
from glassloop.rows import Row
from glassloop.run import Run
from train_loop import update_once

ROWS = 21  # 8 rows an update: two full windows and one of 5
UPDATES = 5  # so the second epoch has begun, and a tail has been trained

ONE_RANK = {
    "1x1x8": {"batch": {"size": 1, "accumulation": 8}},
    "1x2x4": {"batch": {"size": 2, "accumulation": 4}},
    "1x8x1": {"batch": {"size": 8, "accumulation": 1}},
    "1x1x8_recomputed": {"batch": {"size": 1, "accumulation": 8}, "execution": {"checkpointing": True}},
    "1_packed": {"batch": {"size": 2, "accumulation": 4}, "execution": {"layout": "packed"}},
    "1_packed_small": {"batch": {"size": 2, "accumulation": 4}, "execution": {"layout": "packed", "pass_tokens": 96}},
}
TWO_RANKS = {
    "2x1x4": {"batch": {"size": 1, "accumulation": 4}},
    "2x2x2": {"batch": {"size": 2, "accumulation": 2}},
    "2_packed": {"batch": {"size": 2, "accumulation": 2}, "execution": {"layout": "packed"}},
    "2x2x2_ddp": {"batch": {"size": 2, "accumulation": 2}, "execution": {"reduction": "ddp"}},
    "2x2x2_ddp_recomputed": {"batch": {"size": 2, "accumulation": 2}, "execution": {"reduction": "ddp", "checkpointing": True}},
    "2x4x1_ddp": {"batch": {"size": 4, "accumulation": 1}, "execution": {"reduction": "ddp"}},
    "2_packed_ddp": {"batch": {"size": 2, "accumulation": 2}, "execution": {"reduction": "ddp", "layout": "packed"}},
}
REFERENCE = "1x1x8"


def config_of(name: str, member: dict, optimizer: str, folder: Path, model: str, rows: str):
    execution = {"precision": "fp32", "checkpointing": False} | member.get("execution", {})
    return from_values(
        {
            "model": {"id": model},
            "lora": {"r": 4, "alpha": 8},
            "data": {"source": rows, "template": "chat", "max_tokens": 96, "too_long": "cut"},
            "schedule": {"updates": UPDATES, "warmup_updates": 2},
            "optimizer": {"name": optimizer, "lr": 1e-2, "max_grad_norm": None},
            "evaluation": {"samples": 0},
            "run": {"dir": str(folder / "runs"), "name": f"{name}-{optimizer}"},
            **member,
            "execution": execution,
        }
    )


def build(name: str, member: dict, optimizer: str, folder: Path, model: str, rows: str) -> Run:
    """A run on hard rows: ragged, three with a single label, and the window of update 1 without any label on rank 1 (literal layout)."""
    run = build_run(config_of(name, member, optimizer, folder, model, rows))
    # Fresh B is 0, and then A's gradient is 0 too: give both something to do.
    generator = torch.Generator().manual_seed(11)
    for place in run.adapters.slices.values():
        view = place.of(run.adapters.flat.data)
        view.copy_(torch.randn(view.shape, generator=generator) * 0.05)
    bare = set(run.batches.window(1).rows[i] for i in (2, 3, 6, 7))  # rank 1's rows of 2 x 2 x 2
    changed = []
    for index, row in enumerate(run.batches.rows):
        supervised = row.supervised
        if index in bare:
            supervised = (False,) * len(row)
        elif index % 7 == 3:
            supervised = (False,) * (len(row) - 1) + (True,)
        changed.append(Row(row.row_id, row.input_ids, supervised))
    run.batches = replace(run.batches, rows=tuple(changed))
    return run


def measure(name: str, member: dict, folder: Path, model: str, rows: str) -> None:
    tensors = {}
    for optimizer in ("sgd", "adamw_8bit"):
        run = build(name, member, optimizer, folder, model, rows)
        before = run.adapters.flat.detach().clone()
        for u in range(1, UPDATES + 1):
            outcome = update_once(run, u)
            assert outcome is not None and outcome.record.action == "applied", outcome
            if u == 1:
                tensors["grad"] = run.adapters.grad.clone()
        tensors[optimizer] = run.adapters.flat.detach() - before
        run.close_observers()
    if run.rank == 0:
        safetensors.torch.save_file(tensors, folder / f"{name}.safetensors")


if __name__ == "__main__":
    where, model_folder, rows_file = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    for member_name, spec in (TWO_RANKS if "LOCAL_RANK" in os.environ else ONE_RANK).items():
        measure(member_name, spec, where, model_folder, rows_file)
    leave()
