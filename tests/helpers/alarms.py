"""Checks of two ranks when an update is unusual.

`accelerate launch alarms.py FOLDER MODEL ROWS` writes FOLDER/alarms.json. As in faults.py, each
check runs on both ranks; its value is what it returned on each.
"""

from __future__ import annotations

import json
import os
import signal

import torch
from tiny import FOLDER, poisoned, run_of, state

from glassloop.config.arguments import parse
from glassloop.formula.dist import gather_objects, leave
from glassloop.loop.build import build_run
from glassloop.record.jsonl import read_jsonl
from train_loop import train, update_once

MANY = {"updates": 24, "warmup_updates": 2}
SPIKE_AT = 14  # the detectors have their eight entries by then


def spiked(run, at: int = SPIKE_AT) -> None:
    """Multiply the loss of one row of rank 1 by 50.

    In update `at`.
    """
    engine, window = run.replica.engine, run.batches.window(at)
    row = run.batches.share(window, 1)[-1].row_id

    def call(p):
        loss, rows = engine(p)
        if row in p.row_ids and run.now == at:
            factor = torch.tensor([50.0 if one == row else 1.0 for one in p.row_ids])
            labels = (p.targets != -100).sum(dim=1)
            return loss * float(
                (rows * factor * labels).sum() / (rows * labels).sum()
            ), rows * factor
        return loss, rows

    run.replica.engine = call


def updates(run, first: int, last: int):
    """Do updates and inform observers, as train() does."""
    outcome = None
    for u in range(first, last + 1):
        run.now = u
        outcome = update_once(run, u)
        run.tell(outcome)
    return outcome


def spike(reaction: str) -> dict:
    run = run_of(f"spike-{reaction}", schedule=MANY, stability={"on_spike": reaction})
    spiked(run)
    before_norm = updates(run, 1, SPIKE_AT - 1).record.grad_norm_pre_clip
    before = state(run)
    outcome = updates(run, SPIKE_AT, SPIKE_AT)
    record = outcome.record
    events = read_jsonl(run.folder / "events.jsonl") if run.replica.rank == 0 else []
    return gather_objects(
        {
            "alarms": record.alarms,
            "action": record.action,
            "clip": record.clip_coef,
            "norm": record.grad_norm_pre_clip,
            "usual": before_norm,
            "ends": outcome.decision.ends,
            "unchanged": state(run) == before,
            "events": [
                (event["kind"], event["message"], event["command"])
                for event in events
                if event["update"] == SPIKE_AT
            ],
            "capsules": sorted(path.name for path in (run.folder / "capsules").glob("*")),
        }
    )[0]


def spikes() -> dict:
    return {reaction: spike(reaction) for reaction in ("warn", "clip", "skip", "stop")}


def replica_nudged() -> dict:
    """1e-3 added to one entry on rank 1 after two updates."""
    run = run_of("nudged")
    updates(run, 1, 2)
    name, place = list(run.replica.adapters.slices.items())[3]
    if run.replica.rank == 1:
        place.of(run.replica.adapters.flat.data).flatten()[5] += 1e-3
    held = gather_objects(float(place.of(run.replica.adapters.flat.data).flatten()[5]))
    return {"error": error_of(run, 3), "name": name, "held": held}


def moment_nudged() -> dict:
    """One bit of the second moment's bytes on rank 0."""
    run = run_of("moment")
    updates(run, 1, 2)
    name, place = list(run.replica.adapters.slices.items())[2]
    if run.replica.rank == 0:
        run.replica.optimizer.state[run.replica.adapters.flat]["state2"][place.offset + 7] ^= 1
    return {"error": error_of(run, 3), "name": name}


def nudged_before_the_end() -> dict:
    """After the last step there is no further gate: saving asks."""
    run = run_of("end")
    updates(run, 1, 1)
    if run.replica.rank == 1:
        run.replica.adapters.flat.data[3] += 1e-3
    try:
        run.save(1)
        return {"error": None}
    except RuntimeError as error:
        return {"error": str(error), "saved": (run.folder / "checkpoints").exists()}


def error_of(run, u: int) -> str | None:
    try:
        update_once(run, u)
        return None
    except RuntimeError as error:
        return str(error)


def adapters_not_finite() -> dict:
    run = run_of("weights")
    update_once(run, 1)
    run.replica.adapters.flat.data[0] = float("nan")
    outcome = update_once(run, 2)
    return {
        "action": outcome.record.action,
        "reason": outcome.record.reason,
        "nonfinite": outcome.decision.nonfinite,
    }


def nonfinite_is_kept_whole() -> dict:
    run = run_of("nan_kept", stability={"on_nonfinite": "skip"})
    poisoned(run, 1, 1, lambda loss, rows: (loss * float("nan"), rows * float("nan")))
    updates(run, 1, 1)
    found = None
    if run.replica.rank == 0:
        facts = json.loads((run.folder / "capsules" / "update_000001" / "capsule.json").read_text())
        found = {
            "why": facts["why"],
            "ranks": facts["world_size"],
            "files": sorted(os.listdir(run.folder / "capsules" / "update_000001")),
        }
    return gather_objects(found)[0]


def captured_by_number_and_by_signal() -> dict:
    run = run_of("captured", record={"capture_updates": [2]})
    updates(run, 1, 3)
    if run.replica.rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    updates(run, 4, 5)
    names = (
        sorted(path.name for path in (run.folder / "capsules").glob("*"))
        if run.replica.rank == 0
        else None
    )
    return gather_objects(names)[0]


def probes_change_nothing() -> dict:
    states = {}
    for name, record in (
        ("plain", {"probe_every_updates": None, "capsules": 0}),
        ("probed", {"probe_every_updates": 1, "capture_updates": [1, 2]}),
    ):
        run = run_of(f"probes-{name}", record=record)
        updates(run, 1, 4)
        states[name] = state(run)
    probes = read_jsonl(run.folder / "probes.jsonl") if run.replica.rank == 0 else []
    return {"equal": states["plain"] == states["probed"]} | gather_objects({"probes": probes})[0]


def noise_scale() -> dict:
    run = run_of("noise")
    outcomes = [updates(run, u, u) for u in range(1, 4)]
    ddp = run_of("noise-ddp", execution={"reduction": "ddp"})
    return {
        "explicit": [o.record.noise_scale_tokens for o in outcomes],
        "ddp": updates(ddp, 1, 1).record.noise_scale_tokens,
    }


def gone_back() -> dict:
    """Train to the end, then resume twice at update 2.

    Once unchanged and once without update 4's window.
    """
    run = run_of("back", checkpoint={"every_updates": 2, "keep": 9})
    code = train(run)
    run.close_observers()
    whole = trained(run)
    results = {"code": code}
    for name, words in (("same", []), ("without", ["--without-window", "4"])):
        config = parse(["--resume", str(run.folder), "--at", "2", *words])
        again = build_run(config)
        results[f"{name}_code"] = train(again)
        again.close_observers()
        results[name] = trained(again) == whole
    lines = read_jsonl(run.folder / "metrics.jsonl") if run.replica.rank == 0 else []
    last = [
        (line["update"], line["action"], line["reason"], line["lr"])
        for line in lines
        if line["attempt"] == 3
    ]
    kept = json.loads((run.folder / "checkpoints" / "update_000006" / "state.json").read_text())[
        "details"
    ]["left_out"]
    return results | gather_objects({"last": last, "lr": list(run.plan.lr), "left_out": kept})[0]


def trained(run) -> list[float]:
    """All adapters; the padding between them is nobody's and is not kept."""
    return torch.cat(
        [
            place.of(run.replica.adapters.flat.detach()).flatten()
            for place in run.replica.adapters.slices.values()
        ]
    ).tolist()


def going_back_is_refused() -> list[str]:
    refusals = []
    for words in (["--at", "3"], ["--at", "999"]):
        try:
            build_run(parse(["--resume", str(FOLDER / "runs" / "back"), *words]))
        except ValueError as error:
            refusals.append(str(error))
    return refusals


CHECKS = [
    spikes,
    replica_nudged,
    moment_nudged,
    nudged_before_the_end,
    adapters_not_finite,
    nonfinite_is_kept_whole,
    captured_by_number_and_by_signal,
    probes_change_nothing,
    noise_scale,
    gone_back,
    going_back_is_refused,
]

if __name__ == "__main__":
    results = {check.__name__: gather_objects(check()) for check in CHECKS}
    if os.environ["RANK"] == "0":
        (FOLDER / "alarms.json").write_text(json.dumps(results))
    leave()
