"""Checks of two ranks when something goes wrong on one of them.

`accelerate launch faults.py FOLDER MODEL ROWS` writes FOLDER/faults.json. Each check runs on both
ranks; its value is what it returned on each, so that a test can see whether they agree.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, replace

import torch
from early_stop import early_stop_resumed_through
from faults_at_start import (
    folder_of_a_living_run,
    fused_is_off_on_rank_1,
    other_code_on_rank_1,
    other_lr_on_rank_1,
)
from tiny import FOLDER, poisoned, run_of, state

from glassloop.data.rows import Row
from glassloop.formula.dist import gather_objects, leave
from glassloop.loop.watchdog import WAITS
from glassloop.saved.checkpoint import last_checkpoint
from train_loop import train, update_once


def learning_rates_of_20_updates():
    run = run_of(
        "lr", schedule={"updates": 20, "warmup_updates": 5}, batch={"size": 1, "accumulation": 1}
    )
    return [update_once(run, u).record.lr for u in range(1, 21)]


def nan_on_rank_1():
    run = run_of("nan")
    update_once(run, 1)
    before = state(run)
    poisoned(
        run,
        1,
        1,
        lambda loss, rows: (
            loss * float("nan"),
            rows * torch.tensor([1.0] * (len(rows) - 1) + [float("nan")]),
        ),
    )
    outcome = update_once(run, 2)
    row = run.batches.share(run.batches.window(2), 1)[-1].row_id
    return {
        **asdict(outcome.record),
        "unchanged": state(run) == before,
        "row": row,
        "nonfinite": outcome.decision.nonfinite,
    }


def infinite_gradient_on_rank_1():
    run = run_of("inf")
    before = state(run)
    engine = run.replica.engine

    def call(p):
        loss, rows = engine(p)
        if run.replica.rank == 1:
            loss.register_hook(lambda g: g * float("inf"))
        return loss, rows

    run.replica.engine = call
    outcome = update_once(run, 1)
    return {
        "action": outcome.record.action,
        "reason": outcome.record.reason,
        "unchanged": state(run) == before,
    }


def losses_of_unequal_ranks():
    """Give rank 0 a token loss of 1, rank 1 of 3.

    They have different numbers of tokens.
    """
    run = run_of("mean")
    engine = run.replica.engine

    def call(p):
        loss, rows = engine(p)
        per_row = torch.tensor(
            [float((p.targets[p.row_of == i] != -100).sum()) for i in range(len(rows))]
        )
        constant = per_row * (1.0 if run.replica.rank == 0 else 3.0)
        return loss * 0 + constant.sum(), constant

    run.replica.engine = call
    record = update_once(run, 1).record
    n = record.rank_supervised_tokens
    return {
        "logged": record.loss_nats,
        "mean": (n[0] + 3 * n[1]) / sum(n),
        "ranks": record.rank_loss_nats,
        "tokens": n,
    }


def out_of_memory_on_rank_1():
    run = run_of("oom")
    before = state(run)

    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    poisoned(run, 1, 1, exhausted)
    try:
        update_once(run, 1)
        return {"error": None}
    except RuntimeError as error:
        return {"error": str(error), "unchanged": state(run) == before}


def nan_ends_the_run():
    """Train a run whose second update is not finite on rank 1.

    Returns the exit code and what is left.
    """
    run = run_of("ends")
    poisoned(run, 1, 2, lambda loss, rows: (loss * float("nan"), rows * float("nan")))
    code = train(run)
    run.close_observers()
    gather_objects(None)
    events = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    checkpoint, _ = last_checkpoint(run.folder)
    return {"code": code, "last": events[-1], "checkpoint": checkpoint and checkpoint.name}


def stop_asked_on_rank_1():
    run = run_of("stop")
    before = state(run)
    if run.replica.rank == 1:
        run.stop.asked = True
    given_up = update_once(run, 1) is None
    unchanged = state(run) == before
    run.stop.asked = False
    return {"given_up": given_up, "unchanged": unchanged, "then": update_once(run, 1).record.action}


def a_disk_that_syncs_slowly():
    """Slow rank 0's disk down while a stop comes to rank 1.

    Rank 1 waits for it.

    The watchdog's patience is shorter than the disk's time.
    """
    run = run_of("slow-disk", record={"capture_updates": [2]})
    run.watchdog.patience_s = 1.5
    genuine, does, waits = os.fsync, run.watchdog.does, []

    def slow(file):
        time.sleep(0.3)
        genuine(file)

    def stop_in_the_third_gate(update, what):
        does(update, what)
        if update == 3:
            os.fsync = genuine
        if (update, what) == (3, WAITS) and run.replica.rank == 1:
            run.stop.ask("SIGTERM")
            waits.append(time.monotonic())
        elif waits and len(waits) == 1:
            waits.append(time.monotonic())

    run.watchdog.does = stop_in_the_third_gate
    os.fsync = slow if run.replica.rank == 0 else genuine
    try:
        code = train(run)
        run.close_observers()
    finally:
        os.fsync = genuine
    run.watchdog.close()
    checkpoint, notes = last_checkpoint(run.folder)
    waited_s = gather_objects(waits[1] - waits[0] if waits else None)[1]
    return {"code": code, "checkpoint": checkpoint.name, "notes": list(notes), "waited": waited_s}


def nothing_supervised():
    run = run_of("none")
    empty = set(run.batches.window(2).rows)
    rows = tuple(
        Row(r.row_id, r.input_ids, (False,) * len(r)) if i in empty else r
        for i, r in enumerate(run.batches.rows)
    )
    run.batches = replace(run.batches, rows=rows)
    update_once(run, 1)
    before = state(run)
    outcome = update_once(run, 2)
    return {
        **asdict(outcome.record),
        "unchanged": state(run) == before,
        "next": update_once(run, 3).record.action,
    }


def unwrapped_forward():
    """Call the module inside DDP's wrapper, a mutant: nothing is reduced."""
    run = run_of("unwrapped", execution={"reduction": "ddp"})
    run.replica.engine = Unsynchronised(run.replica.plain_engine)
    for u in range(1, 4):
        try:
            update_once(run, u)
        except RuntimeError as error:
            return {"caught_at": u, "error": str(error)}
    return {"caught_at": None}


class Unsynchronised:
    def __init__(self, engine):
        self.engine = engine

    def __call__(self, p):
        return self.engine(p)

    def no_sync(self):
        return contextlib.nullcontext()


def clipping():
    norms = {}
    for max_norm in (None, 1e-3):
        run = run_of(f"clip{max_norm}", optimizer={"max_grad_norm": max_norm, "name": "sgd"})
        record = update_once(run, 1).record
        norms[str(max_norm)] = (
            record.grad_norm_pre_clip,
            record.clip_coef,
            run.replica.adapters.grad.double().norm().item(),
        )
        ranks = record.rank_grad_norm
        cosine = record.rank_cosine
    return {"norms": norms, "rank_norms": ranks, "rank_cosine": cosine}


def evaluation_in_between():
    """Weights after three updates, with and without evaluation and generation between them."""
    states = []
    for name, evaluate in (("plain", False), ("evaluated", True)):
        run = run_of(
            name,
            data={"heldout": 0.2},
            evaluation={"generate_rows": 3, "max_new_tokens": 5, "samples": 0},
        )
        for u in range(1, 4):
            if evaluate:
                run.evaluate(u)
            update_once(run, u)
        states.append(state(run))
    return states[0] == states[1]


def ledger():
    """Compare consumed rows with the plan, by update.

    Two epochs with a tail.
    """
    run = run_of("ledger")
    seen = [
        [(r.rank, r.row_id, r.supervised_tokens) for r in update_once(run, u).rows]
        for u in range(1, 7)
    ]
    return {
        "seen": [sorted(r for _, r, _ in rows) for rows in seen],
        "ranks": [{rank for rank, _, _ in rows} == {0, 1} for rows in seen],
    }


CHECKS = [
    other_lr_on_rank_1,
    other_code_on_rank_1,
    fused_is_off_on_rank_1,
    folder_of_a_living_run,
    learning_rates_of_20_updates,
    nan_on_rank_1,
    infinite_gradient_on_rank_1,
    losses_of_unequal_ranks,
    out_of_memory_on_rank_1,
    nan_ends_the_run,
    stop_asked_on_rank_1,
    a_disk_that_syncs_slowly,
    nothing_supervised,
    unwrapped_forward,
    clipping,
    evaluation_in_between,
    ledger,
    early_stop_resumed_through,
]

if __name__ == "__main__":
    results = {check.__name__: gather_objects(check()) for check in CHECKS}
    if os.environ["RANK"] == "0":
        (FOLDER / "faults.json").write_text(json.dumps(results))
    leave()
