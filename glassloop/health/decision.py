"""The decision on an update's numbers, and its record.

Pure functions of what every rank knows after the gate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from glassloop.config import StabilityConfig
from glassloop.data.batches import Batches, Window
from glassloop.formula.dist import Gate, rank_cosine
from glassloop.health.machine import machine_record
from glassloop.health.signals import Finding, Signals
from glassloop.health.stability import Detectors
from glassloop.record.records import MachineRecord, ProbeRecord, RowRecord, UpdateRecord


@dataclass(frozen=True)
class Terms:
    """The formula's terms in one update, the same on every rank.

    With them what was read beside: times, noise scale, probe.

    Attributes:
        times: host clock at start, after the gate, after the norm, at the end, in s.
    """

    lr: float  # lr(u)
    n: int  # N; 0 if nothing was computed
    norm: float  # |g|, unscaled, before clipping
    scale: float  # fp16's loss scale, else 1: the flat gradient holds g * scale
    fp16: bool = False
    explicit: bool = True  # each rank's norm was taken before the reduction, of rows of its own
    clip: float = 1.0  # c
    times: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    noise: float | None = None  # gradient noise scale, in tokens
    probe: ProbeRecord | None = None
    b_lr: float | None = None  # of B, where it is not lr(u)


@dataclass(frozen=True)
class Decision:
    """The decision of all ranks on an update, before the optimizer moves."""

    reason: str | None  # why it is not applied; None: it is
    max_norm: float | None  # what g is clipped to
    findings: tuple[Finding, ...] = ()
    # loss, gradient or adapters are not finite, and fp16's loss scale does not explain it
    nonfinite: bool = False
    overflow: bool = False  # fp16's loss scale was too high: part of how it works
    ends: bool = False  # the run ends here

    @property
    def bad(self) -> str | None:
        """The reason to keep the update; None for a sound one.

        "nonfinite", or the kind of the first finding.
        """
        return "nonfinite" if self.nonfinite else self.findings[0].kind if self.findings else None


@dataclass(frozen=True)
class Outcome:
    """The result of one update."""

    record: UpdateRecord
    rows: tuple[RowRecord, ...]
    decision: Decision
    stop: bool  # a rank was asked to end the run
    probe: ProbeRecord | None = None
    machine: MachineRecord | None = None


def clip_coefficient(norm: float, max_norm: float | None) -> float:
    """c of the formula: min(1, max_norm / norm).

    1 without clipping or gradient.
    """
    return min(1.0, max_norm / norm) if max_norm is not None and norm > 0 else 1.0


def decide(
    batches: Batches,
    window: Window,
    gate: Gate,
    detectors: Detectors,
    stability: StabilityConfig,
    terms: Terms,
    *,
    left_out: bool,
    broken_weight: str | None,
    max_norm: float | None,
) -> Decision:
    """Decide whether the update is applied, and what it is clipped to.

    All numbers are known on every rank, so that all decide alike.

    Args:
        left_out: the window was taken out of the run on demand.
        broken_weight: the first adapter matrix that is not finite before the update.
        max_norm: optimizer.max_grad_norm.
    """
    if left_out:
        return Decision("its window was left out on demand (resume.without_windows)", max_norm)
    if terms.n == 0:
        return Decision(
            f"no supervised token in its {len(window.rows)} rows ({_names(batches, window.rows)})",
            max_norm,
        )
    if reason := _nonfinite(batches, window, gate, broken_weight, terms):
        overflow = terms.scale != 1.0 and math.isfinite(gate.loss_sum) and broken_weight is None
        return Decision(
            reason,
            max_norm,
            nonfinite=not overflow,
            overflow=overflow,
            ends=not overflow and stability.on_nonfinite == "stop",
        )
    findings = detectors.look(signals_of(window, gate, terms))
    reactions = {reaction_to(finding.kind, stability) for finding in findings}
    messages = "; ".join(finding.message for finding in findings)
    if "clip" in reactions and detectors.usual_norm is not None:
        max_norm = min(detectors.usual_norm, max_norm or math.inf)
    reason = (
        f"{messages} (stability reaction: {'stop' if 'stop' in reactions else 'skip'})"
        if reactions & {"stop", "skip"}
        else None
    )
    return Decision(reason, max_norm, findings, ends="stop" in reactions)


def signals_of(window: Window, gate: Gate, terms: Terms) -> Signals:
    """The numbers that the detectors look at."""
    return Signals(
        window.update, terms.lr, len(window.rows), terms.n, gate.loss_sum / terms.n, terms.norm
    )


def reaction_to(kind: str, stability: StabilityConfig) -> str:
    """The configured reaction to a finding: warn, clip, skip or stop."""
    reactions = {
        "vanishing_gradient": stability.on_vanishing,
        "no_learning": stability.on_no_learning,
        "diverged": stability.on_diverged,
    }
    return reactions.get(kind, stability.on_spike)


def _nonfinite(
    batches: Batches, window: Window, gate: Gate, broken_weight: str | None, terms: Terms
) -> str | None:
    """Name what is not finite, with rank, pass and rows, or None."""
    if broken_weight is not None:
        return f"adapters are not finite before the update: {broken_weight} is the first"
    bad = [
        f"rank {rank}, pass {index}, row {batches.rows[row].row_id}"
        for rank, report in enumerate(gate.reports)
        for (index, row), loss in zip(_places(window, rank), report.row_loss_sums, strict=True)
        if not math.isfinite(loss)
    ]
    if bad:
        return (
            "loss is not finite: "
            + "; ".join(bad[:4])
            + (f" and {len(bad) - 4} more" if len(bad) > 4 else "")
        )
    if math.isfinite(terms.norm):
        return None
    if terms.scale != 1.0:
        return (
            f"fp16 overflow at loss scale {terms.scale:g}: the gradient is not finite, the loss is"
        )
    ranks = [
        rank for rank, report in enumerate(gate.reports) if not math.isfinite(report.grad_norm)
    ]
    rows = [row for rank in ranks for one in window.computed_by(rank) for row in one]
    return (
        f"gradient is not finite on rank {', '.join(map(str, ranks))}, the loss is: rows "
        f"{_names(batches, rows)}"
    )


def describe(
    batches: Batches,
    window: Window,
    gate: Gate,
    decision: Decision,
    terms: Terms,
    attempt: int,
) -> Outcome:
    """Make the records of an update and of its rows.

    They hold the numbers that the update itself used.

    Args:
        attempt: 1, or higher if a resumed run re-runs the update.
    """
    started, computed, reduced, finished = terms.times
    reports = gate.reports
    norms = tuple(report.grad_norm / terms.scale for report in reports)
    record = UpdateRecord(
        update=window.update,
        updates=batches.plan.updates,
        epoch=window.epoch,
        rows=len(window.rows),
        lr=terms.lr,
        b_lr=terms.b_lr,
        loss_nats=gate.loss_sum / terms.n if terms.n else None,
        grad_norm_pre_clip=terms.norm if terms.n else None,
        clip_coef=terms.clip if decision.reason is None and decision.max_norm is not None else None,
        action="applied" if decision.reason is None else "skipped",
        reason=decision.reason,
        supervised_tokens=terms.n,
        rank_loss_nats=tuple(
            # Ranks that share rows have no rows of their own.
            r.loss_sum / r.supervised_tokens if r.supervised_tokens and not window.split else None
            for r in reports
        ),
        rank_supervised_tokens=tuple(r.supervised_tokens for r in reports),
        rank_real_tokens=tuple(r.real_tokens for r in reports),
        rank_slot_tokens=tuple(r.slot_tokens for r in reports),
        rank_passes=tuple(r.passes for r in reports),
        rank_grad_norm=norms if terms.explicit and terms.n else None,
        rank_cosine=rank_cosine(norms, terms.norm) if terms.explicit and terms.n else None,
        loss_scale=terms.scale if terms.fp16 else None,
        update_s=finished - started,
        compute_s=computed - started,
        reduce_s=reduced - computed,
        rank_peak_gib=tuple(r.peak_gib for r in reports)
        if any(r.peak_gib for r in reports)
        else None,
        optimizer_s=finished - reduced,
        noise_scale_tokens=terms.noise,
        alarms=tuple(finding.kind for finding in decision.findings),
        rank_passes_s=tuple(r.passes_s for r in reports),
        attempt=attempt,
    )
    rows = tuple(
        RowRecord(
            update=window.update,
            rank=rank,
            micro_batch=index,
            row_id=batches.rows[row].row_id,
            loss_sum_nats=loss,
            supervised_tokens=batches.rows[row].supervised_tokens,
            real_tokens=len(batches.rows[row]),
            attempt=attempt,
        )
        for rank, report in enumerate(reports)
        for (index, row), loss in zip(_places(window, rank), report.row_loss_sums, strict=True)
    )
    machine = machine_record(window.update, attempt, [report.machine for report in reports])
    return Outcome(record, rows, decision, gate.stop, terms.probe, machine)


def _places(window: Window, rank: int) -> list[tuple[int, int]]:
    """(pass, row) of each of a rank's rows, in its report's order."""
    return [(index, row) for index, rows in enumerate(window.passes[rank]) for row in rows]


def _names(batches: Batches, rows: tuple[int, ...] | list[int]) -> str:
    ids = [batches.rows[row].row_id for row in rows]
    return ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
