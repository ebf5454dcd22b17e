"""Effects of other ranks, batch or accumulation on a run's math.

They name the one field that keeps the rows of an update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from glassloop.plan.steps import StepPlan


@dataclass(frozen=True)
class Change:
    """One variation beside the run as asked.

    Attributes:
        what: the variation as it was typed.
        math: lines that say what changes in the updates themselves; empty where nothing does.
        execution: lines that say what changes in how they are computed.
        cure: the field that keeps the rows of an update, where they change; None otherwise.
        refused: why the variation is impossible; then all else is empty.
    """

    what: str
    math: tuple[str, ...] = ()
    execution: tuple[str, ...] = ()
    cure: str | None = None
    refused: str | None = None


def change(what: str, asked: StepPlan, other: StepPlan, *, rows_kept_by: str) -> Change:
    """Compare two plans of one run.

    `rows_kept_by`: the field that would keep the rows of an update, such as
    batch.rows_per_update=16.
    """
    pairs: list[tuple[str, Any, Any]] = [
        ("rows an update", asked.rows_per_update, other.rows_per_update),
        ("updates an epoch", asked.windows_per_epoch, other.windows_per_epoch),
        ("rows of the tail", asked.tail_rows, other.tail_rows),
        ("updates", asked.updates, other.updates),
        ("epochs", round(asked.epochs, 2), round(other.epochs, 2)),
        ("rows trained on", asked.rows_trained, other.rows_trained),
    ]
    math = [f"{name}: {before:,} -> {after:,}" for name, before, after in pairs if before != after]
    differing = [u for u in range(min(asked.updates, other.updates)) if asked.lr[u] != other.lr[u]]
    if differing:
        u = differing[0]
        math.append(f"lr: from update {u + 1} on ({asked.lr[u]:.3g} -> {other.lr[u]:.3g})")
    layout = [
        ("rows of a pass", asked.size, other.size),
        ("ranks", asked.ranks, other.ranks),
        ("passes a rank and update", asked.accumulation, other.accumulation),
    ]
    execution = [
        f"{name}: {before} -> {after}" for name, before, after in layout if before != after
    ]
    cure = rows_kept_by if asked.rows_per_update != other.rows_per_update else None
    return Change(what, tuple(math), tuple(execution), cure)


def lines_of(one: Change) -> list[str]:
    """A change in one or two lines of text."""
    if one.refused is not None:
        return [f"{one.what}: is impossible: {one.refused}"]
    how = "; ".join(one.execution) or "nothing"
    if not one.math:
        return [
            f"{one.what}: same rows in every update, same lr: the gradient is the same. Only: {how}"
        ]
    cure = f" Keep the rows of an update with {one.cure}" if one.cure else ""
    return [f"{one.what}: changes the math: {'; '.join(one.math)}.{cure}", f"  computed: {how}"]
