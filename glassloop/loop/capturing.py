"""Noise scale, probe and capsule of an update.

Nothing here changes a weight or a gradient.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from torch import Tensor

from glassloop.config import as_dict
from glassloop.data.batches import Window
from glassloop.formula.dist import Gate, gather_objects
from glassloop.health.decision import Decision, Terms
from glassloop.health.probes import Before, read_after, read_before
from glassloop.loop.commands import replay_command
from glassloop.loop.run import Run
from glassloop.loop.watchdog import KEEPS
from glassloop.record.records import ProbeRecord
from glassloop.saved.capsule import CapsuleNotSaved, save_capsule, versions
from glassloop.saved.capsule_facts import CapsuleFacts, Expected


@dataclass(frozen=True)
class Look:
    """The numbers read before the optimizer moved, and the time it took."""

    noise: float | None
    before: Before | None  # of a probe
    seconds: float


def look_before_step(
    run: Run,
    window: Window,
    gate: Gate,
    decision: Decision,
    terms: Terms,
    half: tuple[Tensor, int] | None,
) -> Look:
    """Read noise scale, probe and capsule before the step.

    The gradient is g * scale then. All ranks take part.

    Args:
        half: a lone rank's gradient and supervised tokens half-way through its passes, if taken.
    """
    started = time.perf_counter()
    inspection, replica = run.inspection, run.replica
    noise = inspection.note_noise(gate, replica.adapters.grad, terms, half) if terms.n else None
    probed = terms.n and inspection.probe_due(window.update) and replica.rank == 0
    before = read_before(replica.adapters, terms.scale) if probed else None
    why = inspection.capsule_reason(window.update, gate, decision) if terms.n else None
    if why is not None:
        keep_capsule(run, window, gate, why, terms)
    if gate.capture and terms.n:  # only here: a pre-flight or a lack of memory keeps nothing
        run.capture.answered()
        if run.config.record.capsules == 0:
            none = "SIGUSR1 asked for a capsule, but record.capsules = 0 keeps none"
            run.event(window.update, "warning", none)
    return Look(noise, before, time.perf_counter() - started)


def probe_of(run: Run, update: int, before: Before | None, *, applied: bool) -> ProbeRecord | None:
    """The update's probe after its step, if one was begun."""
    if before is None:
        return None
    return read_after(
        before,
        run.replica.adapters,
        update=update,
        applied=applied,
        scale_of=run.config.lora.scale_of,
        attempt=run.attempt,
    )


def keep_capsule(run: Run, window: Window, gate: Gate, why: str, terms: Terms) -> None:
    """Write the update whole, on rank 0.

    A full disk costs the capsule, not the run.
    """
    replica = run.replica
    rng_states = gather_objects(replica.before.rng)
    if replica.rank != 0:
        return
    record = run.config.record
    facts = facts_of(run, window, gate, why, terms)
    run.does(window.update, KEEPS)
    if run.lock is not None:
        run.lock.check()  # it would make the folder again under its old name
    try:
        saved = save_capsule(
            run.folder / "capsules",
            facts,
            text=record.text,
            adapters=replica.adapters,
            optimizer=replica.optimizer,
            rng_states=rng_states,
            keep=record.capsules,
            most_gib=record.capsules_gib,
        )
    except CapsuleNotSaved as error:
        run.event(window.update, "warning", str(error))
        return
    if saved.path is not None:
        message = f"kept whole ({why}): {saved.path}"
        run.event(window.update, "capsule", message, replay_command(run.folder, window.update))
    if saved.note is not None:
        run.event(window.update, "warning", saved.note)


def facts_of(run: Run, window: Window, gate: Gate, why: str, terms: Terms) -> CapsuleFacts:
    """The facts of an update, from the numbers that it used."""
    replica, reports = run.replica, gate.reports
    norms = tuple(report.grad_norm / terms.scale for report in reports)
    return CapsuleFacts(
        update=window.update,
        epoch=window.epoch,
        attempt=run.attempt,
        why=why,
        world_size=len(reports),
        lr=terms.lr,
        supervised_tokens=terms.n,
        loss_scale=terms.scale,
        finite_updates=replica.before.finite_updates,
        max_grad_norm=run.config.optimizer.max_grad_norm,
        packed=window.packed,
        pad_id=replica.pad_id,
        base_hash=replica.plain_engine.report.base_hash,
        config=as_dict(run.config),
        versions=versions(replica.device),
        passes=window.passes,
        rows={row: run.batches.rows[row] for row in window.rows},
        expected=Expected(
            loss_nats=gate.loss_sum / terms.n if terms.n else None,
            grad_norm_pre_clip=terms.norm if terms.n else None,
            rank_loss_sums=rank_loss_sums(window, gate),
            rank_grad_norms=norms if terms.explicit and terms.n else None,
            row_loss_sums=tuple(report.row_loss_sums for report in reports),
        ),
    )


def rank_loss_sums(window: Window, gate: Gate) -> tuple[float, ...]:
    """Nats of each rank's own rows.

    Rows that ranks share are rank 0's.
    """
    if window.split:
        return (gate.loss_sum, *(0.0 for _ in gate.reports[1:]))
    return tuple(report.loss_sum for report in gate.reports)
