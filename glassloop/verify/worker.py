"""A launched process of `glassloop verify`: its members and mutants.

`python -m glassloop.verify.worker FOLDER` does the formula and the one-rank members; the same under
`accelerate launch` with two processes does the two-rank ones and the mutants. Rank 0 writes
FOLDER/<job>.safetensors, and what tensors cannot say to FOLDER/results_<ranks>.json.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from glassloop.disk.environment import environment
from glassloop.formula.dist import gather_objects, leave
from glassloop.loop.build import build_run
from glassloop.verify.formula import train_by_formula
from glassloop.verify.members import (
    OPTIMIZERS,
    REFERENCE_ENGINE,
    Place,
    Trace,
    config_of,
    members,
    reference_of,
    train,
)
from glassloop.verify.mutants import MUTANTS
from glassloop.verify.problem import TASKS, harden
from glassloop.verify.processes import STUCK, say_progress


@dataclass(frozen=True)
class Job:
    """A member, a mutant or a task's formula."""

    kind: str  # "formula" | "member" | "mutant"
    name: str
    task: str
    run: Callable[[], dict[str, Trace]]  # what it left behind, by optimizer
    fault: str | None = None  # of a mutant
    optional: bool = False  # of an engine that may be absent
    fingerprint: bool = False  # its losses and norms stand for the task when versions are compared


def main(folder: Path) -> None:
    say_progress("")
    torch.set_float32_matmul_precision("highest")  # no TF32; there are no convolutions
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    asked = json.loads((folder / "asked.json").read_text())
    place = Place(
        folder,
        folder / "model",
        folder / "rows.jsonl",
        asked["backend"],
        asked["collective_timeout_s"],
    )
    jobs = jobs_of(ranks, place, asked["only"])
    results = []
    stuck = (folder / f"{STUCK}{ranks}_ranks_{rank}.txt").open("w")
    for number, job in enumerate(jobs, start=1):
        if rank == 0:
            say_progress(f"{number} of {len(jobs)}: {job.name}")
        # Replaces the last job's.
        faulthandler.dump_traceback_later(0.8 * asked["collective_timeout_s"], file=stuck)
        facts, tensors = attempt(job)
        results.append(facts)
        if rank == 0:
            safetensors.torch.save_file(tensors, folder / f"{job.name}.safetensors")
    if rank == 0:
        (folder / f"results_{ranks}.json").write_text(
            json.dumps({"environment": environment(), "jobs": results})
        )
    faulthandler.cancel_dump_traceback_later()
    leave()


def jobs_of(ranks: int, place: Place, only: str) -> list[Job]:
    """Do all jobs for `ranks` processes; `only` filters by name.

    The formula always takes part.
    """
    jobs = []
    if ranks == 1:
        jobs += [
            Job("formula", f"{task} formula", task, lambda task=task: formula(task, place))
            for task in TASKS
        ]
    for member in members():
        if member.ranks == ranks and only in member.name:
            jobs.append(
                Job(
                    "member",
                    member.name,
                    member.task,
                    lambda member=member: {o: train(member, o, place) for o in OPTIMIZERS},
                    optional=member.engine != REFERENCE_ENGINE,
                    fingerprint=member == reference_of(member.task),
                )
            )
    for mutant in MUTANTS:
        if mutant.sound.ranks == ranks and only in mutant.name:
            run = lambda m=mutant: {m.optimizer: train(m.sound, m.optimizer, place, m.update)}  # noqa: E731
            jobs.append(Job("mutant", mutant.name, mutant.task, run, fault=mutant.fault))
    return jobs


def formula(task: str, place: Place) -> dict[str, Trace]:
    """Do the task by formula.py, on its reference member's rows."""
    traces = {}
    for optimizer in OPTIMIZERS:
        example = build_run(
            config_of(reference_of(task), optimizer, place, f"{task}-{optimizer}-formula")
        )
        harden(example)
        example.close_observers()
        traces[optimizer] = train_by_formula(task, optimizer, place, example)
    return traces


def attempt(job: Job) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Do a job; return plain facts and tensors.

    Facts: the job's own, began (no error), stopped_by, left_out, series. Tensors: gradient, and
    changes by optimizer's name.

    Raises:
        RuntimeError: it failed on some ranks only.
    """
    facts: dict[str, Any] = {
        name: value for name, value in vars(job).items() if name not in ("run", "optional")
    }
    facts |= {"began": True, "stopped_by": None, "left_out": None, "series": {}}
    tensors: dict[str, torch.Tensor] = {}
    failure = None
    try:
        for optimizer, trace in job.run().items():
            facts["stopped_by"] = facts["stopped_by"] or trace.stopped_by
            facts["series"] |= {
                f"{optimizer} loss_nats": trace.losses,
                f"{optimizer} grad_norm": trace.norms,
            }
            found = {"gradient": trace.grad, optimizer: trace.change}
            tensors |= {name: tensor.cpu() for name, tensor in found.items() if tensor is not None}
    except Exception as error:  # whatever it is, it is what there is to say of this job
        failure, facts["began"] = f"{type(error).__name__}: {error}", False
        # An engine that is absent, or not for this shape.
        refused = job.optional and isinstance(error, ValueError | ImportError | OSError)
        facts["left_out" if refused else "stopped_by"] = failure
    if len(set(gather_objects(failure is None))) > 1:
        raise RuntimeError(
            f"{job.name} could be done on some ranks only: {failure or 'it failed on another'}"
        )
    return facts, tensors


if __name__ == "__main__":
    main(Path(sys.argv[1]))
