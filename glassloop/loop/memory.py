"""Memory of a run: preflight, smaller passes, cures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from glassloop.base.card_errors import lacks_memory as lacks_memory
from glassloop.config import Config
from glassloop.data.batches import Window
from glassloop.data.rows import Row
from glassloop.formula.dist import Gate, gather_objects
from glassloop.loop.spending import fewer_kept, ranks_on
from glassloop.plan.work import chooses_passes, pass_tokens_for, work_of
from glassloop.predict.ledger import ledger_of
from glassloop.predict.longest import longest_row
from glassloop.predict.shapes import shapes_from_config, shapes_of
from glassloop.predict.terms import GIB, Ledger
from glassloop.predict.tiers import Tiers

if TYPE_CHECKING:
    from glassloop.loop.run import Run


def allocated_gib(device: torch.device) -> float:
    """GPU memory that tensors hold now; 0 without a GPU."""
    return torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else 0.0


def check_gib(device: torch.device) -> dict[str, float]:
    """The most GiB that tensors held until now, as `check`.

    Passes are measured from here on.
    """
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated(device) / GIB
    torch.cuda.reset_peak_memory_stats(device)
    return {"check": peak}


def peak_gib(run: Run) -> float:
    """The most GiB that tensors have held since the run began.

    On this rank's GPU; 0 without one.
    """
    device = run.replica.device
    if device.type != "cuda":
        return 0.0
    return max(torch.cuda.max_memory_allocated(device) / GIB, run.measured_gib.get("check", 0.0))


def ledger_of_pass(run: Run, rows: list[Row]) -> Ledger | None:
    """Predict memory with a pass of these rows as the heaviest.

    None if the model's shapes, targets or engine are unknown.
    """
    shapes, _ = shapes_of(run.config.model.id)
    if shapes is None or not rows:
        return None
    lengths = [len(row) for row in rows]
    count, tokens = (1, sum(lengths)) if run.batches.packed else (len(lengths), max(lengths))
    work = replace(
        work_of(run.config, shapes),
        rows=count,
        tokens=tokens,
        supervised_tokens=sum(row.supervised_tokens for row in rows),
        split=run.replica.ranks if run.batches.split else 1,
    )
    tiers = Tiers.of(run.tiers) if run.tiers is not None else None
    try:
        card = torch.cuda.get_device_capability(run.replica.device)
        return ledger_of(
            shapes, replace(work, capability=card, tiers=tiers), run.config.execution.engine
        )
    except (
        ValueError
    ):  # an engine or targets that the ledger has no terms for: the measurement stands alone
        return None


def memory_lines(run: Run, window: Window) -> list[str]:
    """Predicted beside measured GiB of this rank, by phase.

    Call it after the preflight; empty without a GPU. What came before the passes, loading and the
    check of the engine, is measured alone.
    """
    if run.replica.device.type != "cuda":
        return []
    measured = run.measured_gib | {
        "peak": torch.cuda.max_memory_allocated(run.replica.device) / GIB
    }
    check = measured.pop("check", None)
    passes = window.computed_by(run.replica.rank)
    ledger = ledger_of_pass(run, [run.batches.rows[row] for one in passes for row in one])
    predicted = (
        {}
        if ledger is None
        else {phase: f"{size / GIB:.2f}" for phase, size in ledger.phases.items()}
    )
    pairs = [
        f"{phase} {predicted.get(phase, 'unknown')} / {value:.2f}"
        for phase, value in measured.items()
    ]
    before = "" if check is None else f"; at most {check:.2f} before the passes"
    return [f"predicted / measured GiB: {', '.join(pairs)}{before}"]


def choose_pass_tokens(
    config: Config, model: Mapping[str, Any], device: torch.device, before: Mapping[str, Any]
) -> int:
    """Choose the most tokens of a packed pass, equal on all ranks.

    As asked; else as plan.json has it; else as memory allows.

    Args:
        model: the loaded model's config. before: plan.json of the run to resume; empty for a new
            one.
    """
    asked = pass_tokens_for(config, None, None)
    if not chooses_passes(config) or device.type != "cuda":
        return asked
    if before:
        # One from before passes were chosen keeps its own.
        return int(before.get("pass_tokens") or asked)
    free = torch.cuda.mem_get_info(device)[0] // ranks_on(device)
    most = pass_tokens_for(
        config,
        shapes_from_config(dict(model), config.model.id),
        torch.cuda.memory_reserved(device) + free,
    )
    return min(gather_objects(most))


def longest_here(run: Run) -> int | None:
    """Predicted tokens of the longest row that fits this card.

    Under `fused`.

    None for another engine or device, and for unknown shapes.
    """
    engine, device = run.replica.plain_engine, run.replica.device
    shapes, _ = shapes_of(run.config.model.id)
    if engine.name != "fused" or device.type != "cuda" or shapes is None:
        return None
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    capability = torch.cuda.get_device_capability(device)
    split = run.replica.ranks if run.batches.split else 1
    work = replace(work_of(run.config, shapes), capability=capability, split=split)
    if engine.host.most_bytes is not None:
        work = replace(work, host_gib=engine.host.most_bytes / GIB)
    return longest_row(shapes, work, free).tokens


def cures(run: Run) -> str:
    """Settings that need less memory and keep an update's rows."""
    execution, batch = run.config.execution, run.config.batch
    cures = []
    if not execution.checkpointing:
        cures.append("execution.checkpointing=true")
    if execution.layout != "literal":
        cures.append("a smaller execution.pass_tokens")
    elif batch.size > 1:
        cures.append(
            f"batch.size={batch.size // 2} batch.rows_per_update={run.plan.rows_per_update}"
        )
    cures.append(
        f"a smaller data.max_tokens (now {run.config.data.max_tokens}), which leaves out "
        "or cuts long rows"
    )
    longest = longest_here(run)
    said = "" if longest is None else f". The longest row that fits here has {longest:,} tokens"
    return "; or ".join(cures) + said


def smaller_passes(run: Run, update: int, why: str) -> bool:
    """Recompute more, or halve every pass, after a lack of memory.

    Returns False if the config, ddp or a pass of one row forbids it.
    """
    execution = run.config.execution
    largest = max(len(one) for passes in run.batches.heaviest().passes for one in passes)
    if execution.on_out_of_memory == "stop" or run.replica.ddp or run.batches.split:
        return False
    if fewer_kept(run, update, why):
        return True
    if largest == 1:
        return False
    run.batches = replace(run.batches, halvings=run.batches.halvings + 1)
    if run.replica.device.type == "cuda":
        torch.cuda.empty_cache()
    rows = max(len(one) for passes in run.batches.heaviest().passes for one in passes)
    message = (
        f"{why}. From here on passes have half the rows ({rows} at most) and there are twice "
        "as many; rows an update, and g, stay"
    )
    run.event(update, "out_of_memory", message)
    return True


def preflight_done(run: Run, window: Window, gate: Gate) -> None:
    """Report the heaviest passes.

    Raises ValueError if their loss or gradient is not finite (fp16 may overflow once).
    """
    reports = gate.reports
    bad = [r for r, report in enumerate(reports) if not math.isfinite(report.loss_sum)]
    if not bad and run.replica.scale.value == 1:
        bad = [r for r, report in enumerate(reports) if not math.isfinite(report.grad_norm)]
    if bad:
        ids = ", ".join(row.row_id for rank in bad for row in run.batches.share(window, rank))
        raise ValueError(
            "preflight, before update 1: loss or gradient is not finite on rank "
            f"{', '.join(map(str, bad))} (rows {ids}): look at these rows, "
            "or set execution.precision to bf16 or fp32"
        )
    for line in memory_lines(run, window):
        run.event(run.first_update - 1, "memory", line)
    slots = max(report.slot_tokens for report in reports)
    peak = max(report.peak_gib for report in reports)
    memory = (
        f", peak {peak:.2f} GiB of "
        f"{torch.cuda.get_device_properties(run.replica.device).total_memory / 2**30:.1f}"
        if peak
        else ""
    )
    run.event(
        run.first_update - 1,
        "preflight",
        f"the heaviest pass of each rank ({slots:,} slot tokens at most) fits and is "
        f"finite{memory}",
    )
