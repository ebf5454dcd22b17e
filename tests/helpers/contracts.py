"""Checks of the plan's contract on two ranks.

Each line is broken on purpose, and memory runs out.

`accelerate launch contracts.py FOLDER MODEL ROWS` writes FOLDER/contracts.json, as faults.py does.
"""

from __future__ import annotations

import json
import os
from collections import Counter

import torch
from tiny import FOLDER, poisoned, run_of, state

import train_loop
from glassloop.data.rows import Row
from glassloop.formula.dist import gather_objects, leave
from glassloop.plan.contract import ContractBroken
from glassloop.record.jsonl import read_jsonl
from train_loop import train, update_once

REAL_BUILD_PASS = train_loop.build_pass


def broken_at(run, change) -> dict:
    """Do two good updates, then `change` rank 1.

    Returns what both ranks say, and what moved.
    """
    update_once(run, 1)
    update_once(run, 2)
    before = state(run)
    try:
        change(run)
        update_once(run, 3)
        error = None
    except ContractBroken as caught:
        error = str(caught)
    finally:
        train_loop.build_pass = REAL_BUILD_PASS
    return {"error": error, "unchanged": state(run) == before}


def pass_changed(change):
    """Change the rows of rank 1's passes before they are tensors."""

    def apply(run) -> None:
        if run.replica.rank == 1:
            train_loop.build_pass = lambda rows, **settings: REAL_BUILD_PASS(
                change(rows), **settings
            )

    return apply


def unlabelled(row: Row) -> Row:
    first = row.supervised.index(True)
    return Row(
        row.row_id, row.input_ids, tuple(s and i != first for i, s in enumerate(row.supervised))
    )


def row_lost() -> dict:
    return broken_at(run_of("row"), pass_changed(lambda rows: rows[:1]))


def row_twice() -> dict:
    return broken_at(run_of("twice"), pass_changed(lambda rows: [*rows, rows[0]]))


def label_lost() -> dict:
    return broken_at(run_of("label"), pass_changed(lambda rows: [unlabelled(rows[0]), *rows[1:]]))


def token_lost() -> dict:
    return broken_at(
        run_of("token"),
        pass_changed(
            lambda rows: [
                Row(rows[0].row_id, rows[0].input_ids[1:], rows[0].supervised[1:]),
                *rows[1:],
            ]
        ),
    )


def other_lr() -> dict:
    """A leftover scheduler that writes its own lr before the step."""

    def apply(run) -> None:
        real = run.batches.supervised_tokens

        def and_schedule(window):
            run.replica.optimizer.param_groups[0]["lr"] *= 0.5
            return real(window)

        object.__setattr__(run.batches, "supervised_tokens", and_schedule)

    return broken_at(run_of("lr"), apply)


def plan_and_ledger() -> dict:
    """A whole run's rows, counted, beside its plan.json."""
    run = run_of("ledger")
    code = train(run)
    run.close_observers()
    result = None
    if run.replica.rank == 0:
        plan = json.loads((run.folder / "plan.json").read_text())
        lines = read_jsonl(run.folder / "rows.jsonl")
        updates = range(1, plan["updates"] + 1)
        rows = Counter(line["update"] for line in lines)
        supervised, real = Counter(), Counter()
        for line in lines:
            supervised[line["update"]] += line["supervised_tokens"]
            real[line["update"]] += line["real_tokens"]
        counted = {"rows": rows, "supervised_tokens": supervised, "real_tokens": real}
        result = {
            "code": code,
            "planned": plan["by_update"],
            "counted": {name: [counts[u] for u in updates] for name, counts in counted.items()},
            "facts": plan["contract"],
        }
    return gather_objects(result)[0]


def memory_runs_out(name: str, **execution) -> dict:
    """Let rank 1 run out of memory in update 2.

    Passes of one row still fit.
    """
    run = run_of(name, execution=execution)
    engine = run.replica.engine

    def call(p):
        if run.replica.rank == 1 and run.now == 2 and len(p.row_ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return engine(p)

    real = train_loop.update_once

    def counted(run, u):
        run.now = u
        return real(run, u)

    run.replica.engine, train_loop.update_once = call, counted
    try:
        code = train(run)
    finally:
        train_loop.update_once = real
    run.close_observers()
    lines = read_jsonl(run.folder / "metrics.jsonl") if run.replica.rank == 0 else []
    events = read_jsonl(run.folder / "events.jsonl") if run.replica.rank == 0 else []
    told = [
        (line["update"], line["rows"], line["action"], line["rank_passes"], line["loss_nats"])
        for line in lines
    ]
    return {"code": code} | gather_objects(
        {"updates": told, "events": [(e["kind"], e["message"]) for e in events]}
    )[0]


def out_of_memory() -> dict:
    return {
        "plain": plain("plain"),
        "smaller": memory_runs_out("smaller"),
        "stop": memory_runs_out("stop", on_out_of_memory="stop"),
    }


def plain(name: str) -> list:
    run = run_of(name)
    train(run)
    run.close_observers()
    lines = read_jsonl(run.folder / "metrics.jsonl") if run.replica.rank == 0 else []
    return gather_objects([(line["rows"], line["loss_nats"]) for line in lines])[0]


def preflight(name: str, change) -> dict:
    run = run_of(name, execution={"preflight": True})
    change(run)
    before = state(run)
    try:
        train_loop.preflight(run)
        error = None
    except ValueError as caught:
        error = str(caught)
    events = read_jsonl(run.folder / "events.jsonl") if run.replica.rank == 0 else []
    result = gather_objects([(e["kind"], e["message"]) for e in events])[0]
    longest = max((len(row), row.row_id) for row in run.batches.rows)
    return {
        "error": error,
        "events": result,
        "unchanged": state(run) == before,
        "longest": longest,
        "halvings": run.batches.halvings,
    }


def exhausted(above: int):
    def change(run) -> None:
        engine = run.replica.engine

        def call(p):
            if run.replica.rank == 1 and len(p.row_ids) > above:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return engine(p)

        run.replica.engine = call

    return change


def preflights() -> dict:
    def nan(run):
        return poisoned(run, 1, 0, lambda loss, rows: (loss * float("nan"), rows * float("nan")))

    return {
        "sound": preflight("sound", lambda run: None),
        "nan": preflight("pre-nan", nan),
        "halved": preflight("halved", exhausted(1)),
        "full": preflight("full", exhausted(0)),
    }


def other_rows_on_resume() -> str | None:
    """The data file changed between the run and its resumption."""
    from glassloop.config.arguments import parse
    from glassloop.loop.build import build_run

    run = run_of("changed", checkpoint={"every_updates": 3})
    for u in range(1, 4):
        update_once(run, u)
    run.save(3)
    run.close_observers()
    gather_objects(None)
    if run.replica.rank == 0:
        path = run.folder / "plan.json"
        path.write_text(path.read_text().replace(run.contract.rows_digest, "0" * 16))
    gather_objects(None)
    try:
        build_run(parse(["--resume", str(FOLDER / "runs" / "changed")]))
    except ValueError as error:
        return str(error)
    return None


CHECKS = [
    row_lost,
    row_twice,
    label_lost,
    token_lost,
    other_lr,
    plan_and_ledger,
    out_of_memory,
    preflights,
    other_rows_on_resume,
]

if __name__ == "__main__":
    results = {check.__name__: gather_objects(check()) for check in CHECKS}
    if os.environ["RANK"] == "0":
        (FOLDER / "contracts.json").write_text(json.dumps(results))
    leave()
