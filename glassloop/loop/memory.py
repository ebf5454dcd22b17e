"""Memory of a run: preflight, smaller passes, cures."""

from __future__ import annotations

import math
import socket
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from glassloop.config import Config
from glassloop.data.batches import Window
from glassloop.data.rows import Row
from glassloop.formula.dist import Gate, gather_objects
from glassloop.plan.work import chooses_passes, pass_tokens_for, work_of
from glassloop.predict.ledger import ledger_of
from glassloop.predict.shapes import shapes_from_config, shapes_of
from glassloop.predict.terms import GIB, Ledger
from glassloop.predict.tiers import Base, Tiers, describe

if TYPE_CHECKING:
    from glassloop.loop.run import Run


def allocated_gib(device: torch.device) -> float:
    """GPU memory that tensors hold now; 0 without a GPU."""
    return torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else 0.0


def ledger_of_pass(run: Run, rows: list[Row]) -> Ledger | None:
    """Predict memory with a pass of these rows as the heaviest.

    None if the model's shapes, targets or engine are unknown.
    """
    shapes, _ = shapes_of(run.config.model.id)
    if shapes is None or not rows:
        return None
    packed = run.batches.layout == "packed"
    count, tokens = (1, sum(map(len, rows))) if packed else (len(rows), max(map(len, rows)))
    work = replace(
        work_of(run.config),
        rows=count,
        tokens=tokens,
        supervised_tokens=sum(row.supervised_tokens for row in rows),
    )
    tiers = Tiers(**run.tiers) if run.tiers is not None else None
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

    Call it after the preflight; empty without a GPU.
    """
    if run.replica.device.type != "cuda":
        return []
    measured = run.measured_gib | {
        "peak": torch.cuda.max_memory_allocated(run.replica.device) / GIB
    }
    ledger = ledger_of_pass(run, run.batches.share(window, run.replica.rank))
    predicted = (
        {}
        if ledger is None
        else {phase: f"{size / GIB:.2f}" for phase, size in ledger.phases.items()}
    )
    pairs = [
        f"{phase} {predicted.get(phase, 'unknown')} / {value:.2f}"
        for phase, value in measured.items()
    ]
    return [f"predicted / measured GiB: {', '.join(pairs)}"]


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
        return int(
            before.get("pass_tokens") or asked
        )  # one from before passes were chosen keeps its own
    free = torch.cuda.mem_get_info(device)[0] // ranks_on(device)
    most = pass_tokens_for(
        config,
        shapes_from_config(dict(model), config.model.id),
        torch.cuda.memory_reserved(device) + free,
    )
    return min(gather_objects(most))


def ranks_on(device: torch.device) -> int:
    """Count the ranks that share this rank's device. All take part."""
    own = f"{socket.gethostname()} {device}"
    return gather_objects(own).count(own)


def spend_memory(run: Run) -> None:
    """Choose how many layers keep activations, equal on all ranks.

    Only `fused` can.

    A resumed run takes what its checkpoint has, as long as the ranks have room for it.
    """
    engine = run.replica.plain_engine
    if engine.name != "fused":
        return
    if not run.config.execution.checkpointing:
        place_base(engine, run.config.memory.base)
        return
    window = run.batches.heaviest()
    passes = [[run.batches.rows[row] for row in one] for rank in window.passes for one in rank]
    tokens = max(run.batches.slots(one) for rank in window.passes for one in rank)
    supervised = max(sum(row.supervised_tokens for row in one) for one in passes)
    memory = run.config.memory
    engine.use_tiers(
        replace(engine.tiers, held=0)
    )  # what is held is given back before free memory is counted
    engine.host.most_tokens = tokens
    sizes = dict(tokens=tokens, supervised_tokens=supervised, host_gib=memory.host_gib)
    sizes |= {"base": memory.base}
    found = engine.choose_tiers(memory.profile, **sizes, sharing=ranks_on(run.replica.device))
    kept = min(gather_objects(found.kept))
    before = run.tiers
    held = min(gather_objects(found.held))
    streamed = max(gather_objects(found.streamed))  # the same bits wherever layers lie
    if before is not None and (before["kept"], before["held"]) <= (kept, held):
        found = replace(found, **(before | {"streamed": streamed}))
    else:
        found = replace(found, kept=kept, host=any(gather_objects(found.host)), held=held)
        found = replace(found, streamed=streamed)
    use_tiers(run, found)
    run.header = (
        *run.header,
        f"memory    {describe(found, len(engine.layers))} (memory.profile={memory.profile})",
    )


def can_stream(engine: Any) -> bool:
    """Whether layers of the base may lie on the host."""
    return engine.pages is not None and engine.pages.mapped is not None


def place_base(engine: Any, asked: str | int) -> None:
    """Put as many layers on the card as `memory.base` asks.

    auto: all of them.
    """
    if not can_stream(engine):
        return
    one = Base(asked, engine.pages.file.manifest.most_layer_bytes)
    streamed = one.streamed(len(engine.layers)) or 0
    if engine.tiers.streamed != streamed:
        engine.use_tiers(replace(engine.tiers, streamed=streamed))


def use_tiers(run: Run, tiers: Any) -> None:
    """From here on."""
    run.replica.plain_engine.use_tiers(tiers)
    run.tiers = asdict(tiers)


def fewer_kept(run: Run, update: int, why: str) -> bool:
    """Need less GPU memory after a lack of it.

    Hold no weights, keep fewer layers, or stream the base.

    Returns False if the least is done, or nothing can be chosen.
    """
    if run.tiers is None:
        return False
    engine = run.replica.plain_engine
    tiers, layers = engine.tiers, len(engine.layers)
    if tiers.held:
        less = replace(tiers, held=0)
    elif tiers.kept > 1:
        less = replace(tiers, kept=max(1, tiers.kept * 3 // 4))
    elif run.config.memory.base == "auto" and can_stream(engine) and tiers.streamed < layers:
        less = replace(tiers, streamed=layers)
    else:
        return False
    use_tiers(run, less)
    if run.replica.device.type == "cuda":
        torch.cuda.empty_cache()
    run.event(
        update,
        "out_of_memory",
        f"{why}. From here on {describe(run.replica.plain_engine.tiers, layers)}; rows, "
        "passes and g stay",
    )
    return True


def cures(run: Run) -> str:
    """Settings that need less memory and keep an update's rows."""
    execution, batch = run.config.execution, run.config.batch
    cures = []
    if not execution.checkpointing:
        cures.append("execution.checkpointing=true")
    if execution.layout == "packed":
        cures.append("a smaller execution.pass_tokens")
    elif batch.size > 1:
        cures.append(
            f"batch.size={batch.size // 2} batch.rows_per_update={run.plan.rows_per_update}"
        )
    cures.append(
        f"a smaller data.max_tokens (now {run.config.data.max_tokens}), which leaves out "
        "or cuts long rows"
    )
    return "; or ".join(cures)


def smaller_passes(run: Run, update: int, why: str) -> bool:
    """Recompute more, or halve every pass, after a lack of memory.

    Returns False if the config, ddp or a pass of one row forbids it.
    """
    execution = run.config.execution
    largest = max(len(one) for passes in run.batches.heaviest().passes for one in passes)
    if execution.on_out_of_memory == "stop" or run.replica.ddp:
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
