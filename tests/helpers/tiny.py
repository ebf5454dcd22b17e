"""A small run for launched scripts, and ways to spoil it.

The scripts get FOLDER MODEL ROWS.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from glassloop.config.arguments import from_values
from glassloop.loop.build import build_run
from glassloop.loop.run import Run

FOLDER, MODEL, ROWS = Path(sys.argv[1]), sys.argv[2], sys.argv[3]


def run_of(name: str, **sections: dict) -> Run:
    values = {
        "model": {"id": MODEL},
        "lora": {"r": 4, "alpha": 8},
        "data": {"source": ROWS, "template": "chat", "max_tokens": 96, "too_long": "cut"},
        "batch": {"size": 2, "accumulation": 2},
        "schedule": {"updates": 6, "warmup_updates": 2},
        "optimizer": {"lr": 1e-2},
        "execution": {"precision": "fp32", "checkpointing": False, "preflight": False},
        "evaluation": {"samples": 0},
        "run": {"dir": str(FOLDER / "runs"), "name": name},
    }
    for section, fields in sections.items():
        values[section] = {**values.get(section, {}), **fields}
    return build_run(from_values(values))


def poisoned(run: Run, rank: int, at_pass: int, change) -> None:
    """Have `change` make another result of one rank's pass number `at_pass`."""
    engine, calls = run.replica.engine, iter(range(1000))

    def call(p):
        result = engine(p)
        return change(*result) if run.replica.rank == rank and next(calls) == at_pass else result

    run.replica.engine = call


def state(run: Run) -> str:
    """Bits of adapters and optimizer, to compare before and after."""
    tensors = [
        run.replica.adapters.flat.detach(),
        *(
            v
            for v in run.replica.optimizer.state[run.replica.adapters.flat].values()
            if torch.is_tensor(v)
        ),
    ]
    return " ".join(str(hash(t.numpy().tobytes())) for t in tensors) + str(
        [
            v
            for v in run.replica.optimizer.state[run.replica.adapters.flat].values()
            if not torch.is_tensor(v)
        ]
    )
