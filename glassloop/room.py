"""What fits into memory: the preflight's findings, smaller passes after a rank ran out, and what a user can do about it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from glassloop.batches import Window
from glassloop.dist import Gate
from glassloop.planning.outlook import work_of
from glassloop.predict.ledger import GIB, Ledger, ledger_of
from glassloop.predict.shapes import shapes_of
from glassloop.rows import Row

if TYPE_CHECKING:
    from glassloop.run import Run


def allocated_gib(device: torch.device) -> float:
    """GPU memory that tensors hold now; 0 without a GPU."""
    return torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else 0.0


def ledger_of_pass(run: Run, rows: list[Row]) -> Ledger | None:
    """Predicted memory with a pass of these rows as the heaviest; None where nothing is known of the model's shapes, targets or engine."""
    shapes, _ = shapes_of(run.config.model.id)
    if shapes is None or not rows:
        return None
    packed = run.batches.layout == "packed"
    count, tokens = (1, sum(map(len, rows))) if packed else (len(rows), max(map(len, rows)))
    work = replace(work_of(run.config), rows=count, tokens=tokens, supervised_tokens=sum(row.supervised_tokens for row in rows))
    try:
        card = torch.cuda.get_device_capability(run.device)
        return ledger_of(shapes, replace(work, capability=card), run.config.execution.engine)
    except ValueError:  # an engine or targets that the ledger has no terms for: the measurement stands alone
        return None


def memory_lines(run: Run, window: Window) -> list[str]:
    """Predicted beside measured GiB of this rank, by phase, after the preflight; nothing without a GPU."""
    if run.device.type != "cuda":
        return []
    measured = run.measured_gib | {"peak": torch.cuda.max_memory_allocated(run.device) / GIB}
    ledger = ledger_of_pass(run, run.batches.share(window, run.rank))
    predicted = {} if ledger is None else {phase: f"{size / GIB:.2f}" for phase, size in ledger.phases.items()}
    pairs = [f"{phase} {predicted.get(phase, 'unknown')} / {value:.2f}" for phase, value in measured.items()]
    return [f"predicted / measured GiB: {', '.join(pairs)}"]


def cures(run: Run) -> str:
    """Settings that need less memory and leave the rows of an update as they are."""
    execution, batch = run.config.execution, run.config.batch
    cures = []
    if not execution.checkpointing:
        cures.append("execution.checkpointing=true")
    if execution.layout == "packed":
        cures.append("a smaller execution.pass_tokens")
    elif batch.size > 1:
        cures.append(f"batch.size={batch.size // 2} batch.rows_per_update={run.plan.rows_per_update}")
    cures.append(f"a smaller data.max_tokens (now {run.config.data.max_tokens}), which leaves out or cuts long rows")
    return "; or ".join(cures)


def smaller_passes(run: Run, update: int, why: str) -> bool:
    """Cut every pass of the run in two after a rank ran out of memory. False: by config, under ddp, or where a pass is one row."""
    execution = run.config.execution
    largest = max(len(one) for passes in run.batches.heaviest().passes for one in passes)
    if execution.on_out_of_memory == "stop" or run.ddp or largest == 1:
        return False
    run.batches = replace(run.batches, halvings=run.batches.halvings + 1)
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    rows = max(len(one) for passes in run.batches.heaviest().passes for one in passes)
    message = (
        f"{why}. From here on passes have half the rows ({rows} at most) and there are twice as many; rows an update, and g, stay"
    )
    run.event(update, "out_of_memory", message)
    return True


def preflight_done(run: Run, window: Window, gate: Gate) -> None:
    """Say what the heaviest passes took. Raises ValueError where their loss or gradient is not finite (fp16 may overflow once)."""
    reports = gate.reports
    bad = [r for r, report in enumerate(reports) if not math.isfinite(report.loss_sum)]
    if not bad and run.scale.value == 1:
        bad = [r for r, report in enumerate(reports) if not math.isfinite(report.grad_norm)]
    if bad:
        ids = ", ".join(row.row_id for rank in bad for row in run.batches.share(window, rank))
        raise ValueError(
            f"preflight, before update 1: loss or gradient is not finite on rank {', '.join(map(str, bad))} (rows {ids}): look at these rows, "
            "or set execution.precision to bf16 or fp32"
        )
    for line in memory_lines(run, window):
        run.event(run.first_update - 1, "memory", line)
    slots = max(report.slot_tokens for report in reports)
    peak = max(report.peak_gib for report in reports)
    memory = f", peak {peak:.2f} GiB of {torch.cuda.get_device_properties(run.device).total_memory / 2**30:.1f}" if peak else ""
    run.event(
        run.first_update - 1,
        "preflight",
        f"the heaviest pass of each rank ({slots:,} slot tokens at most) fits and is finite{memory}",
    )
