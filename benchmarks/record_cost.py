"""What the record costs.

Update_once with probes off, and with per-layer probes at every update, beside the formula alone.

    python benchmarks/record_cost.py MODEL [--workload scam-v1] [--rounds 6] [--out FILE]
    [section.field=VALUE ...]

One process, one model, three arms that take turns on the same rows, so that all see the same
machine: `bare` (passes, norm, clip, step: no report, checksum, detector, noise scale or file),
`recorded` (the run's update with every observer of its folder, no probe) and `probed` (a probe of
every matrix at each update). A machine's own noise can be larger than what is looked for, so all
three are timed again with an engine
that computes next to nothing: what is left of an update is then its overhead, and differences of
that over the real `bare` update are the figures to go by. On a card two more arms take turns:
`recorded` with the allocation history of loop/witness.py, and with the thread that asks NVML.
added_cost.py's figures stand beside. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from added_cost import recorder_cost, sampler_cost
from lines import tell

from glassloop.bench.workloads import workload
from glassloop.config.arguments import parse
from glassloop.data.batches import build_pass
from glassloop.disk.environment import environment
from glassloop.formula.dist import leave
from glassloop.formula.optim import l2_norm
from glassloop.health.decision import clip_coefficient
from glassloop.loop.build import build_run
from glassloop.loop.machine_here import sampler_of
from glassloop.loop.run import Run
from glassloop.loop.witness import Witness
from glassloop.plan.steps import make_plan
from train_loop import update_once

ON_CARD = torch.cuda.is_available()


def bare(run: Run, u: int) -> None:
    """The formula and nothing else."""
    window = run.batches.window(u)
    n = run.batches.supervised_tokens(window)
    run.replica.adapters.zero_grad()
    for rows in window.passes[0]:
        p = build_pass(
            [run.batches.rows[row] for row in rows],
            packed=window.packed,
            pad_id=run.replica.pad_id,
            device=run.replica.device,
        )
        loss_sum, _ = run.replica.engine(p)
        (loss_sum / n).backward()
    norm = l2_norm(run.replica.adapters.grad).item()
    run.replica.adapters.grad.mul_(clip_coefficient(norm, run.config.optimizer.max_grad_norm))
    run.replica.optimizer.step()


def watched(run: Run, u: int) -> None:
    outcome = update_once(run, u)
    assert outcome is not None
    run.tell(outcome)


def arms_here() -> tuple[str, ...]:
    """The arms that this machine can time: three, and two more with a card."""
    return ("bare", "recorded", "probed", *(("history", "sampled") if ON_CARD else ()))


@contextlib.contextmanager
def added(run: Run, arm: str) -> Iterator[None]:
    """What an arm adds to `recorded`, outside of what is timed."""
    if arm == "history":
        Witness(run.folder, 0, run.replica.device).attach()
    if arm == "sampled":
        run.machine.start()
    yield
    if arm == "history":
        torch.cuda.memory._record_memory_history(enabled=None)
    if arm == "sampled":
        run.machine.close()
        run.machine, _ = sampler_of(run.config, run.replica)  # a thread starts once


def seconds(run: Run, arm: str, u: int) -> float:
    """Time update u of an arm."""
    with added(run, arm):
        return timed(run, arm, u)


def timed(run: Run, arm: str, u: int) -> float:
    run.inspection.record = replace_probe(run, 1 if arm == "probed" else None)
    if run.replica.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    (bare if arm == "bare" else watched)(run, u)
    if run.replica.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def overheads(run: Run, updates: int, arms: tuple[str, ...], repeats: int) -> dict[str, float]:
    """Median seconds of an update of each arm without its forward and backward."""
    engine = run.replica.engine

    def next_to_nothing(p):
        loss = run.replica.adapters.flat[:4096].square().sum()  # so that there is a gradient
        return loss, torch.full((len(p.row_ids),), 0.01, device=run.replica.device)

    run.replica.engine = next_to_nothing
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for index in range(repeats):
        for arm in arms[index % len(arms) :] + arms[: index % len(arms)]:
            times[arm].append(seconds(run, arm, 1 + index % updates))
    run.replica.engine = engine
    return {arm: statistics.median(values[1:]) for arm, values in times.items()}


def replace_probe(run: Run, every: int | None):
    return run.config.record.model_copy(update={"probe_every_updates": every, "capsules": 0})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="folder or hub id of the base")
    parser.add_argument("--workload", default="scam-v1")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path)
    given, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        rows_file = Path(folder) / "rows.jsonl"
        rows_file.write_text('{"prompt": "hello there", "completion": "hi"}\n' * 32)
        words = [
            f"model.id={given.model}",
            f"data.source={rows_file}",
            "data.template=instruct",
            f"run.dir={folder}",
            "run.name=cost",
            "execution.engine=peft",
        ]
        run = build_run(
            parse([*words, "evaluation.samples=0", "batch.rows_per_update=16", *overrides])
        )
        vocabulary = run.replica.plain_engine.hf.config.get_text_config().vocab_size
        per_update, updates = run.plan.rows_per_update, given.rounds + 1
        rows = workload(given.workload, per_update * updates, vocabulary=vocabulary)
        settings = dict(
            size=run.plan.size,
            ranks=1,
            accumulation=run.plan.accumulation,
            tail="keep",
            updates=updates,
            epochs=1.0,
        )
        plan = make_plan(
            rows=len(rows), **settings, warmup=1, peak=2e-4, kind="linear", first="peak_over_warmup"
        )
        run.plan, run.contract, run.batches = plan, None, replace(run.batches, rows=rows, plan=plan)
        arms = arms_here()
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        for u in range(1, updates + 1):
            turn = (
                arms[u % len(arms) :] + arms[: u % len(arms)]
            )  # each arm comes first as often as the others
            for arm in turn:
                taken = seconds(run, arm, u)
                if u > 1:  # the first round warms up
                    times[arm].append(taken)
        alone = overheads(run, updates, arms, repeats=25)
        run.close_observers()
    medians = {arm: statistics.median(values) for arm, values in times.items()}
    result = {
        "what": "record_cost",
        "workload": given.workload,
        "overrides": overrides,
        "rows_per_update": per_update,
        "seconds": times,
        "median_s": medians,
        "overhead_s": alone,
        "recorded_costs": (alone["recorded"] - alone["bare"]) / medians["bare"],
        "probed_costs": (alone["probed"] - alone["bare"]) / medians["bare"],
        "added_costs_s": {
            arm: medians[arm] - medians["recorded"] for arm in ("history", "sampled") if ON_CARD
        },
        "recorded_over_bare": medians["recorded"] / medians["bare"],
        "probed_over_bare": medians["probed"] / medians["bare"],
        "ratios_by_round": {
            arm: [value / base for value, base in zip(times[arm], times["bare"], strict=True)]
            for arm in ("recorded", "probed")
        },
        "sampler": sampler_cost(),
        "recorder": recorder_cost(),
        "environment": environment(["record_cost.py"]),
    }
    tell(result, given.out)
    leave()


if __name__ == "__main__":
    main()
