"""Checks of two ranks that differ before they train.

In config, code, engine or folder.
"""

from __future__ import annotations

import os

from tiny import run_of

from glassloop.formula.dist import gather_objects
from glassloop.loop import engine_here, same_program
from train_loop import update_once


def refused(**sections):
    """The refusal of a run, in words."""
    try:
        run_of("refused", **sections).close_observers()
        return None
    except ValueError as error:
        return str(error)


def other_lr_on_rank_1():
    """The config of one rank differs: named before anything is built."""
    return refused(optimizer={"lr": (0.01, 0.02)[int(os.environ["RANK"])]})


def other_code_on_rank_1():
    """One rank has another file of the package."""
    genuine = same_program.program

    def program(config):
        found = genuine(config)
        if os.environ["RANK"] == "1":
            found["code"]["glassloop/formula/loss.py"] = "f" * 64
        return found

    same_program.program = program
    try:
        return refused()
    finally:
        same_program.program = genuine


def fused_is_off_on_rank_1():
    """Rank 1's fused engine is 1 % off.

    Returns the refusal of a named engine, and what `auto` takes instead.
    """
    from glassloop.engines.fused.engine import FusedEngine

    genuine, here = FusedEngine.forward, (engine_here.on_cuda, engine_here.lacking_here)

    def forward(self, p):
        return tuple(1.01 * sums for sums in genuine(self, p))

    if os.environ["RANK"] == "1":
        FusedEngine.forward = forward
    engine_here.on_cuda, engine_here.lacking_here = lambda: True, lambda: ""
    try:
        named = refused(execution={"engine": "fused"})
        run = run_of("doubted", execution={"engine": "auto"})
        told = [notice.message for notice in run.changes]
        run.close_observers()
        record = update_once(run, 1).record
        return {"named": named, "told": told, "engine": run.config.execution.engine,
                "loss": record.loss_nats, "ranks": record.rank_loss_nats}  # fmt: skip
    finally:
        FusedEngine.forward = genuine
        engine_here.on_cuda, engine_here.lacking_here = here


def folder_of_a_living_run():
    """A second run resumes the first one, which still writes."""
    run = run_of("living")
    try:
        return refused(resume={"run": str(run.folder), "at": 0})
    finally:
        run.close_observers()
        gather_objects(None)
