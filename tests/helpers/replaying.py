"""Two-rank runs to be replayed on one process.

`accelerate launch replaying.py FOLDER MODEL ROWS` leaves them in FOLDER/runs.

MODEL is one that is sure of itself (planted.sure_base), with NaN in the embedding of token 511.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from planted import ROWS, continuations, write_lines
from tiny import FOLDER, MODEL, run_of

from glassloop.data.rows import Row
from glassloop.formula.dist import leave
from glassloop.loop.run import Run
from train_loop import train, update_once

UPDATES = 4  # of a planted run; the fault is in the last


def whole(name: str, updates: int, **sections: dict) -> None:
    run = run_of(name, schedule={"updates": updates, "warmup_updates": 2}, **sections)
    assert train(run) == 0
    run.close_observers()


def planted(name: str, spoil: Callable[[Run, int], Row]) -> None:
    """Train on the model's continuations, and spoil one row.

    It is in rank 1's last pass.
    """
    source = write_lines(FOLDER / f"{name}-{ROWS}.jsonl", ROWS)
    run = run_of(
        name,
        model={"quantization": "none"},
        data={"source": str(source)},
        schedule={"updates": 30, "warmup_updates": 1},
        optimizer={"lr": 1e-4},
        stability={"on_nonfinite": "skip"},
        record={"capture_updates": [UPDATES]},
    )
    run.contract = None  # the plan knows the file's rows
    run.batches = replace(run.batches, rows=continuations(Path(MODEL)))
    for u in range(1, UPDATES + 1):
        if u == UPDATES:
            number = run.batches.window(u).passes[1][-1][0]
            rows = list(run.batches.rows)
            rows[number] = spoil(run, number)
            run.batches = replace(run.batches, rows=tuple(rows))
        outcome = update_once(run, u)
        assert outcome is not None
        run.tell(outcome)
    run.close_observers()


def costly(_run: Run, _number: int) -> Row:
    (row,) = continuations(Path(MODEL), worst=True, rows=1, start=100)
    return row


def poisoned(run: Run, number: int) -> Row:
    row = run.batches.rows[number]
    return replace(row, row_id="row:nan", input_ids=(*row.input_ids[:10], 511, *row.input_ids[11:]))


if __name__ == "__main__":
    shared = {"lora": {"dropout": 0.1}, "checkpoint": {"every_updates": 3}}
    whole("literal", 6, **shared, record={"capture_updates": [5]})
    whole("packed", 3, execution={"layout": "packed"})
    whole("ddp", 3, execution={"reduction": "ddp"}, record={"capture_updates": [2]})
    planted("row", costly)
    planted("nan", poisoned)
    leave()
