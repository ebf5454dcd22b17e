"""What became of an update: the verdict on its numbers, and its record. Pure functions of what every rank knows after the gate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from glassloop.batches import Batches, Window
from glassloop.dist import Gate, rank_cosine
from glassloop.record import RowRecord, UpdateRecord


@dataclass(frozen=True)
class Outcome:
    """One carried-out update."""

    record: UpdateRecord
    rows: tuple[RowRecord, ...]
    stop: bool  # a rank was asked to end the run
    nonfinite: bool  # skipped for loss or gradient that fp16's loss scale does not explain


def clip_coefficient(norm: float, max_norm: float | None) -> float:
    """c of the formula: min(1, max_norm / norm); 1 without clipping or gradient."""
    return min(1.0, max_norm / norm) if max_norm is not None and norm > 0 else 1.0


def verdict(batches: Batches, window: Window, gate: Gate, n: int, norm: float, scale: float) -> str | None:
    """Why the update must not be applied, or None. It names rank, pass and rows of what is not finite."""
    if n == 0:
        return f"no supervised token in its {len(window.rows)} rows ({_names(batches, window.rows)})"
    bad = [
        f"rank {rank}, pass {index}, row {batches.rows[row].row_id}"
        for rank, report in enumerate(gate.reports)
        for (index, row), loss in zip(_places(window, rank), report.row_loss_sums, strict=True)
        if not math.isfinite(loss)
    ]
    if bad:
        return "loss is not finite: " + "; ".join(bad[:4]) + (f" and {len(bad) - 4} more" if len(bad) > 4 else "")
    if math.isfinite(norm):
        return None
    if scale != 1.0:
        return f"fp16 overflow at loss scale {scale:g}: the gradient is not finite, the loss is"
    ranks = [rank for rank, report in enumerate(gate.reports) if not math.isfinite(report.grad_norm)]
    rows = [row for rank in ranks for one in window.passes[rank] for row in one]
    return f"gradient is not finite on rank {', '.join(map(str, ranks))}, the loss is: rows {_names(batches, rows)}"


def describe(
    batches: Batches,
    window: Window,
    gate: Gate,
    reason: str | None,
    *,
    lr: float,
    n: int,
    norm: float,
    clip: float,
    scale: float,
    max_norm: float | None,
    explicit: bool,
    fp16: bool,
    times: tuple[float, float, float, float],
    attempt: int,
) -> Outcome:
    """The update's record and its rows' records, from the numbers that the update itself used.

    Args:
        norm: of g, before clipping. n: N of the formula. times: host clock at start, after the gate, after the norm, at the end, in s.
        explicit: each rank's norm was taken before reduction. attempt: 1, or higher in a resumed run that does the update again.
    """
    started, computed, reduced, finished = times
    reports = gate.reports
    norms = tuple(report.grad_norm / scale for report in reports)
    record = UpdateRecord(
        update=window.update,
        updates=batches.plan.updates,
        epoch=window.epoch,
        rows=len(window.rows),
        lr=lr,
        loss_nats=gate.loss_sum / n if n else None,
        grad_norm_pre_clip=norm if n else None,
        clip_coef=clip if reason is None and max_norm is not None else None,
        action="applied" if reason is None else "skipped",
        reason=reason,
        supervised_tokens=n,
        rank_loss_nats=tuple(r.loss_sum / r.supervised_tokens if r.supervised_tokens else None for r in reports),
        rank_supervised_tokens=tuple(r.supervised_tokens for r in reports),
        rank_real_tokens=tuple(r.real_tokens for r in reports),
        rank_slot_tokens=tuple(r.slot_tokens for r in reports),
        rank_passes=tuple(r.passes for r in reports),
        rank_grad_norm=norms if explicit and n else None,
        rank_cosine=rank_cosine(norms, norm) if explicit and n else None,
        loss_scale=scale if fp16 else None,
        update_s=finished - started,
        compute_s=computed - started,
        reduce_s=reduced - computed,
        rank_peak_gib=tuple(r.peak_gib for r in reports) if any(r.peak_gib for r in reports) else None,
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
    overflow = fp16 and math.isfinite(gate.loss_sum)
    return Outcome(record, rows, gate.stop, nonfinite=reason is not None and n > 0 and not overflow)


def _places(window: Window, rank: int) -> list[tuple[int, int]]:
    """(pass, row) of each of a rank's rows, in the order of its report."""
    return [(index, row) for index, rows in enumerate(window.passes[rank]) for row in rows]


def _names(batches: Batches, rows: tuple[int, ...] | list[int]) -> str:
    ids = [batches.rows[row].row_id for row in rows]
    return ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
