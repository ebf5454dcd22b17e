"""The parts of two_gpus.py that are judged by results.

Each takes a Place, what was asked and a deadline, and returns verdicts by name. No torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import two_gpus_runs as runs
from suite import Verdict, failed, judged
from two_gpus_runs import Place

from glassloop.bench.results import TOLERANCE

# What must be equal in two runs of the same rows, beside the rows' ids.
TRAINED = ("rows", "supervised_tokens", "lr")


@dataclass(frozen=True)
class Asked:
    """What a person may change: see two_gpus.py --help."""

    updates: int = 60
    first: int = 8
    verify_only: str = ""
    rows_per_update: int = 16
    bench_updates: int = 3
    workloads: tuple[str, ...] = ("full-v1", "scam-v1")
    layers: int = 16
    slower: float = 1.0
    engines: tuple[str, ...] = ("peft", "fused")
    pythons: tuple[tuple[str, str], ...] = ()


Part = Callable[[Place, Asked, float], dict[str, Verdict]]


def peft(place: Place, asked: Asked, until: float) -> dict[str, Verdict]:
    """The recipe with the reference engine and the summed all-reduce, two ranks."""
    name, folder = "peft", place.work / "runs" / "peft"
    one = runs.train(
        place,
        name,
        runs.recipe(place, name, f"schedule.updates={asked.updates}", "checkpoint.keep=2"),
    )
    code = one.wait(until)
    runs.end(one)
    updates = runs.updates_of(folder)
    numbers: dict[str, Any] = {"exit_code": code, "updates": len(updates), **runs.speed(updates)}
    if updates:
        numbers |= {
            "loss_nats_first": updates[1]["loss_nats"],
            "loss_nats_last": updates[max(updates)]["loss_nats"],
        }
    whole = len(updates) == asked.updates and all(
        line["action"] == "applied" for line in updates.values()
    )
    parted = [
        line["message"]
        for line in runs.lines_of(folder, "events.jsonl")
        if line["kind"] == "failed"
    ]
    # The gate of every update refuses replicas whose checksums of adapters and optimizer differ,
    # before anything is applied.
    agree = Verdict(
        "missed" if parted else "held" if updates else "failed",
        parted[0]
        if parted
        else f"adapters and optimizer had equal checksums before each of {len(updates)} updates",
        {"updates_compared": len(updates)},
    )
    if not updates:
        return {"the recipe, peft": failed(ended(code), one, **numbers), "replicas agree": agree}
    said = f"{len(updates)} of {asked.updates} updates; {ended(code)}"
    done = judged(True, said, **numbers) if whole and code == 0 else failed(said, one, **numbers)
    return {"the recipe, peft": done, "replicas agree": agree}


def one_rank(place: Place, asked: Asked, until: float) -> dict[str, Verdict]:
    return {"one rank, same losses": _beside(place, asked, until, "one-rank", 1, [])}


def ddp(place: Place, asked: Asked, until: float) -> dict[str, Verdict]:
    return {
        "reduction ddp, same losses": _beside(
            place, asked, until, "ddp", 2, ["execution.reduction=ddp"]
        )
    }


def fused(place: Place, asked: Asked, until: float) -> dict[str, Verdict]:
    """The fast engine on two ranks.

    Its first update beside the reference engine's, all of them beside the same engine on one rank.

    No more than the first beside the reference: in bf16 that rounds most of small adapters' share
    away, so the two part (docs/findings.md).
    """
    words = ["execution.engine=fused", "execution.layout=packed"]
    return {
        "engine fused, first update": _beside(place, asked, until, "fused", 2, words, most=1),
        "engine fused, one rank": _beside(
            place, asked, until, "fused-one-rank", 1, words, beside="fused"
        ),
    }


def _beside(
    place: Place,
    asked: Asked,
    until: float,
    name: str,
    ranks: int,
    words: list[str],
    *,
    beside: str = "peft",
    most: int | None = None,
) -> Verdict:
    """The first updates of the recipe done otherwise, beside those of another run.

    Same plan, so same rows and lr; ended by SIGTERM then.

    Args:
        beside: name of the other run. most: updates that are compared; None: all of the first.
    """
    folder = place.work / "runs" / name
    wanted = min(asked.first, asked.updates)
    asked_for = [
        f"schedule.updates={asked.updates}",
        f"batch.ranks={ranks}",
        "checkpoint.every_updates=null",
        *words,
    ]
    one = runs.train(place, name, runs.recipe(place, name, *asked_for), ranks=ranks)
    one.reaches(lambda: len(runs.updates_of(folder)) >= wanted, until)
    code = one.process.poll()
    runs.end(one, 25.0)  # it saves a checkpoint on its way out
    found = compared(place, folder, place.work / "runs" / beside, wanted, one, most=most, code=code)
    if found.verdict == "failed":
        return found
    # With one rank nothing is summed; DDP does it inside backward.
    unseen = ranks == 1 or "execution.reduction=ddp" in words
    none = {"reduce_share": None, "reduce_s_median": None} if unseen else {}
    return replace(found, numbers=found.numbers | {"ranks": ranks} | none)


def compared(
    place: Place,
    folder: Path,
    known: Path,
    wanted: int,
    one: runs.Started,
    *,
    most: int | None = None,
    code: int | None = None,
) -> Verdict:
    """Compare the first updates of a run with those of another.

    Args:
        wanted: updates that were asked for. most: as many of them are compared; None: all.
        one: the run's process. code: its exit code, None if it was ended.
    """
    beside = known.name
    ours, theirs = runs.updates_of(folder), runs.updates_of(known)
    ours = {update: line for update, line in ours.items() if update <= wanted}
    timed, wanted = ours, min(wanted, most or wanted)
    ours = {update: line for update, line in ours.items() if update <= wanted}
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return failed(
            "no update to compare"
            + (f"; {ended(code)}" if not ours else f": the run {beside} has none"),
            one,
        )
    other_rows = _other_rows(folder, known)
    loss, norm = (runs.apart(ours, theirs, field) for field in ("loss_nats", "grad_norm_pre_clip"))
    # fp32 parts too, once 8-bit AdamW has rounded.
    marks = TOLERANCE[place.precision] if place.device == "cuda" else TOLERANCE["bf16"]
    held = (
        max(loss.values()) <= marks[0]
        and max(norm.values()) <= marks[1]
        and not other_rows
        and len(shared) >= wanted
    )
    numbers = {
        "updates_compared": len(shared),
        "other_rows_in_updates": other_rows,
        "loss_off_update_1": loss[shared[0]],
        "loss_off_worst": max(loss.values()),
        "grad_norm_off_worst": max(norm.values()),
        "loss_off": list(loss.values()),
        "beside": beside,
        "marks": list(marks),
        **runs.speed(timed),
    }
    why = f"losses of {len(shared)} of the first {wanted} updates differ by at most "
    why += f"{max(loss.values()):.1e}, norms by {max(norm.values()):.1e}"
    return judged(
        held, why + (f"; OTHER ROWS in updates {other_rows}" if other_rows else ""), **numbers
    )


def _other_rows(ours: Path, theirs: Path) -> list[int]:
    """Updates that both have and in which rows, tokens or lr were not the same."""
    a, b, mine, known = (
        runs.updates_of(ours),
        runs.updates_of(theirs),
        runs.rows_of(ours),
        runs.rows_of(theirs),
    )
    return [
        update
        for update in sorted(a.keys() & b.keys())
        if mine.get(update) != known.get(update)
        or any(a[update][name] != b[update][name] for name in TRAINED)
    ]


def verify(place: Place, asked: Asked, until: float) -> dict[str, Verdict]:
    """`glassloop verify`."""
    words = [
        place.python,
        "-m",
        "glassloop.cli",
        "verify",
        "--json",
        "--device",
        place.device,
        "--only",
        asked.verify_only,
    ]
    one = runs.start(place, words, "verify", 2)
    code = one.wait(until)
    runs.end(one)
    try:
        output = runs.json_in(one.log)
    except ValueError:
        return {"glassloop verify": failed(ended(code), one)}
    bad = [verdict["name"] for verdict in output["verdicts"] if not verdict["good"]]
    numbers = {name: output[name] for name in ("gpus", "seconds", "only", "verdicts")}
    why = f"{len(output['verdicts'])} ways and deliberate faults, {len(bad)} not as they should be"
    why += f": {', '.join(bad)}" if bad else ""
    return {"glassloop verify": judged(output["good"], why, **numbers)}


def ended(code: int | None) -> str:
    return "cut off by its time limit" if code is None else f"exit code {code}"
