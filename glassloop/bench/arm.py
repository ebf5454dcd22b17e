"""One arm of a benchmark, in a process of its own.

Start it as `python -m glassloop.bench.arm SPEC.json`, or under `accelerate launch` for several
ranks. A run is built as train_loop.py builds it, its rows are exchanged for a named workload's, and
`update_once` does its updates. Rank 0 prints one line of JSON and adds it to the spec's `out`. Exit
code 0: measured; 3: not measured, and the line says why.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

REACHED = time.time()

import torch  # noqa: E402  (its import belongs to the time from launch)

from glassloop.bench.ceiling import matmul_ceiling  # noqa: E402
from glassloop.bench.clock import Clock  # noqa: E402
from glassloop.bench.machine import card_state, processor  # noqa: E402
from glassloop.bench.observed import (  # noqa: E402
    memory_of,
    p2p_of,
    passes_of,
    shares,
    tokens_of,
    uuid_of,
    wait_for,
)
from glassloop.bench.profile import SUMMARY, TRACE, profiled  # noqa: E402
from glassloop.bench.spec import Spec, read_spec  # noqa: E402
from glassloop.bench.sums import digest_of, energy_of, most, times, turns_of, utilisation  # noqa: E402
from glassloop.bench.workloads import OWN, workload  # noqa: E402
from glassloop.config import Config  # noqa: E402
from glassloop.config.arguments import parse  # noqa: E402
from glassloop.data.batches import epoch_order  # noqa: E402
from glassloop.data.rows import Row  # noqa: E402
from glassloop.disk.environment import environment  # noqa: E402
from glassloop.formula.dist import gather_objects, leave  # noqa: E402
from glassloop.loop.build import build_run  # noqa: E402
from glassloop.loop.run import Run  # noqa: E402
from glassloop.loop.spending import spend_memory  # noqa: E402
from glassloop.plan.steps import make_plan  # noqa: E402
from glassloop.predict.shapes import shapes_from_config  # noqa: E402
from glassloop.record.observers import JsonlObserver  # noqa: E402
from glassloop.record.records import UpdateRecord  # noqa: E402

GIB = 2**30


def main(path: Path) -> int:
    """Measure the spec in `path`; rank 0 writes its line."""
    spec = read_spec(path)
    with tempfile.TemporaryDirectory(prefix="glassloop-bench-") as folder:
        try:
            line, code = (
                profile_arm(spec, Path(folder))
                if spec.profile
                else measure(spec, Path(folder), path.parent),
                0,
            )
        except (
            ValueError,
            RuntimeError,
            OSError,
        ) as error:  # refused, or out of memory: what there is to say of this arm
            line, code = {"failed": f"{type(error).__name__}: {error}"[:600]}, 3
    line = spec.about | line
    if _rank() == 0:
        text = json.dumps(line)
        if spec.out:
            with open(spec.out, "a", encoding="utf-8") as file:
                file.write(text + "\n")
        print(text, flush=True)
    if code == 0:
        leave()
    return code


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def measure(spec: Spec, folder: Path, signals: Path) -> dict[str, Any]:
    """Build the run, do its warm-up and measured updates, and sum up.

    All ranks take part; the result is rank 0's.

    Args:
        folder: the run's.
        signals: folder of the files by which arms take turns (see clock.py).
    """
    run = build(spec, folder)
    if run.replica.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.replica.device)
    uuid, tiers = uuid_of(run.replica.device), getattr(run.replica.plain_engine, "tiers", None)
    clock = Clock(
        spec,
        signals,
        uuid=uuid,
        first_rank=run.replica.rank == 0,
        wait=lambda: wait_for(run.replica.device),
        rest=lambda: _rest(run, tiers),
        wake=lambda: None if tiers is None else run.replica.plain_engine.use_tiers(tiers),
    )
    records = [clocked_update(run, u, clock) for u in range(1, spec.total_updates + 1)]
    ranks = gather_objects({"joules": clock.joules, **memory_of(run.replica.device)})
    after = card_state(uuid) if run.replica.rank == 0 else None
    run.close_observers()
    measured, seconds = [records[u - 1] for u in spec.measured_updates], clock.measured_s
    tokens = tokens_of(measured)
    return {
        "rows_digest": digest_of(run.batches.rows[row] for row in run.batches.window(1).rows),
        "updates": len(measured),
        "warmup_s": clock.warmup_update_s,
        "measured_s": seconds,
        "turns": turns_of(clock.turns_s, [one.real_tokens for one in measured]),
        "tokens_per_s": tokens.per_s(seconds),
        "tokens_per_s_per_rank": tokens.per_s(seconds, spec.ranks),
        **times(
            None if spec.turns else spec.launched_at or REACHED,
            clock.started,
            clock.first_ended,
            clock.measured_update_s,
        ),
        "peak": {
            name: most(rank[name] for rank in ranks)
            for name in ("allocated_gib", "reserved_gib", "host_gib")
        },
        "shares": shares(run, spec, measured, sum(clock.measured_update_s)),
        "energy": energy_of([rank["joules"] for rank in ranks], clock.during, seconds, tokens.real),
        "update_1": {"loss_nats": records[0].loss_nats, "grad_norm": records[0].grad_norm_pre_clip},
        "losses_nats": [one.loss_nats for one in records],
        "passes": list(measured[0].rank_passes),
        "tiers": run.tiers,
        "flops": flops(run, spec, seconds, tiers),
        "card": {
            "before": clock.before,
            "during": clock.during,
            "after": after,
            "p2p": p2p_of(run.replica.device),
        },
        "machine": {
            **environment(["glassloop bench"]),
            "threads": torch.get_num_threads(),
            "cpu": processor(),
        },
    }


def flops(run: Run, spec: Spec, seconds: float, tiers: Any) -> dict[str, Any] | None:
    """FLOPs and utilisation of the measured updates; None for unknown shapes.

    `tiers`: of the engine fused, None for another.
    """
    shapes = shapes_from_config(run.replica.plain_engine.hf.config.to_dict(), spec.model)
    if shapes is None:
        return None
    return utilisation(
        shapes,
        passes_of(run.batches, spec),
        packed=spec.layout == "packed",
        r=spec.r,
        targets=run.config.lora.targets,
        checkpointing=spec.checkpointing,
        seconds=seconds,
        ranks=spec.ranks,
        ceiling=matmul_ceiling(shapes, run.replica.device) if run.replica.rank == 0 else None,
        kept=None if tiers is None else tiers.kept,
        host="nothing" if tiers is None else tiers.host,
    )


def profile_arm(spec: Spec, folder: Path) -> dict[str, Any]:
    """Profile update `spec.profile` on rank 0; write trace and page.

    Nothing is measured.
    """
    run = build(spec, folder)
    for u in range(1, spec.profile):
        applied_update(run, u)
    if run.replica.rank == 0:
        where = (
            torch.cuda.get_device_name(run.replica.device)
            if run.replica.device.type == "cuda"
            else processor() or "CPU"
        )
        about = (
            f"Update {spec.profile}: {spec.name}",
            f"{spec.model}, {spec.precision}, {spec.rows_per_update} rows an update",
            where,
        )
        into = Path(spec.profile_dir)
        profiled(
            lambda: applied_update(run, spec.profile), into, device=run.replica.device, about=about
        )
        line = {
            "profile": {
                "update": spec.profile,
                "trace": str(into / TRACE),
                "summary": str(into / SUMMARY),
            }
        }
    else:
        applied_update(run, spec.profile)
        line = {}
    gather_objects(0)  # the others wait for the trace: a rank that leaves ends the group
    run.close_observers()
    return line


def build(spec: Spec, folder: Path) -> Run:
    """The run as configured, on the rows of the workload."""
    run = build_run(config_of(spec, folder))
    # Files as in any run, no lines in between.
    run.observers = [one for one in run.observers if isinstance(one, JsonlObserver)]
    total = max(spec.total_updates, spec.profile)
    rows = rows_of(run, spec, total)
    o, s = run.config.optimizer, run.config.schedule
    plan = make_plan(
        rows=len(rows),
        size=run.plan.size,
        ranks=run.replica.ranks,
        accumulation=run.plan.accumulation,
        tail="drop",  # of the user's own rows: every update has as many
        updates=total,
        epochs=1.0,
        warmup=1,
        peak=o.lr,
        kind=s.kind,
        first=s.first,
    )
    run.plan, run.contract, run.batches = plan, None, replace(run.batches, rows=rows, plan=plan)
    spend_memory(run)  # anew: the rows are longer than those that the run was built on
    return run


def rows_of(run: Run, spec: Spec, updates: int) -> tuple[Row, ...]:
    """Order the workload's rows by update.

    For `own`, return the run's own rows in their order.
    """
    if spec.workload == OWN:
        rows = run.batches.rows
        if len(rows) < spec.rows_per_update:
            raise ValueError(
                f"data.source gives {len(rows)} rows, and an update takes {spec.rows_per_update}: "
                "lower --rows-per-update"
            )
        return tuple(rows)
    vocabulary = run.replica.plain_engine.hf.config.get_text_config().vocab_size
    rows = workload(spec.workload, spec.rows_per_update * updates, vocabulary=vocabulary)
    order = epoch_order(len(rows), run.config.seed, 0)
    return tuple(row for _, row in sorted(zip(order, rows, strict=True), key=lambda pair: pair[0]))


def config_of(spec: Spec, folder: Path) -> Config:
    """Build the arm's config: the recipe's updates and nothing else.

    Evaluation, probes, capsules and preflight are off.
    """
    data = []
    # A run needs some rows to be built; they are exchanged for the workload's.
    if spec.workload != OWN:
        rows_file = folder / "rows.jsonl"
        rows_file.write_text(
            '{"prompt": "hello there", "completion": "hi"}\n' * max(32, spec.rows_per_update)
        )
        data = [f"data.source={rows_file}", "data.template=instruct"]
    words = [
        f"model.id={spec.model}",
        f"lora.r={spec.r}",
        *data,
        f"batch.size={spec.batch}",
        f"batch.rows_per_update={spec.rows_per_update}",
        f"batch.ranks={spec.ranks}",
        f"execution.engine={spec.engine}",
        f"execution.layout={spec.layout}",
        f"execution.precision={spec.precision}",
        f"execution.checkpointing={spec.checkpointing}",
        f"execution.backend={spec.backend}",
        "execution.preflight=false",
        "evaluation.samples=0",
        "record.probe_every_updates=null",
        "record.capsules=0",
        f"run.dir={folder}",
        "run.name=arm",
    ]
    return parse([*words, *spec.varied, *spec.overrides], prog="glassloop bench")


def clocked_update(run: Run, u: int, clock: Clock) -> UpdateRecord:
    """Do update u; return when the device and the observers are done."""
    clock.begin(u)
    record = applied_update(run, u)
    clock.end(u)
    return record


def applied_update(run: Run, u: int) -> UpdateRecord:
    """Update u by the loop's own code.

    Raises RuntimeError where it was not applied: its time would be worth nothing.
    """
    from train_loop import update_once

    outcome = update_once(run, u)
    assert outcome is not None  # nobody asks an arm to stop
    run.tell(outcome)
    if outcome.record.action != "applied":
        raise RuntimeError(f"update {u} was not applied: {outcome.record.reason}")
    return outcome.record


def _rest(run: Run, tiers: Any) -> None:
    """Give back what other arms may need of the GPU's memory.

    `tiers`: of the engine fused, None for another.
    """
    gather_objects(0)  # no rank says that the turn is over while another still computes
    if tiers is not None:
        run.replica.plain_engine.use_tiers(replace(tiers, held=0))
    if run.replica.device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is written; Unsloth can hang in its own shutdown
