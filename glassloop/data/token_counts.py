"""Tokens and sources of a run's updates, counted from its real rows."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from glassloop.data.batches import Batches, packed_passes
from glassloop.data.sources import MixedPart
from glassloop.plan.work import TokenCounts


def count_tokens(batches: Batches) -> TokenCounts:
    """Count over all updates of the plan, in both layouts.

    The heaviest pass is that of the layout that the run has.
    """
    lengths, supervised = batches.lengths, batches.labels
    plan, real, labels = batches.plan, 0, 0
    slots, passes = {"literal": 0, "packed": 0}, {"literal": 0, "packed": 0}
    heaviest, share = (0, 0, 0, 0), 0  # places, rows, tokens, supervised
    excess: list[float] = []  # of an update's heaviest rank
    for update in range(1, plan.updates + 1):
        window = batches.window(update)
        real += sum(lengths[row] for row in window.rows)
        labels += sum(supervised[row] for row in window.rows)
        chunks = [
            window.rows[start : start + plan.size]
            for start in range(0, len(window.rows), plan.size)
        ]
        bins = packed_passes(window.rows, lengths, plan.ranks, batches.pass_tokens)
        packed = [one for rank in bins for one in rank]
        share = max(share, *(sum(lengths[row] for one in rank for row in one) for rank in bins))
        slots["literal"] += sum(len(chunk) * max(lengths[row] for row in chunk) for chunk in chunks)
        slots["packed"] += sum(lengths[row] for one in packed for row in one)
        passes["literal"] += len(chunks)
        passes["packed"] += len(packed)
        places = [sum(map(batches.slots, rank)) for rank in window.passes]
        excess.append(max(places) * len(places) / sum(places) - 1)
        for one in (one for rank in window.passes for one in rank):
            longest, total = max(lengths[row] for row in one), sum(lengths[row] for row in one)
            rows, tokens = (1, total) if window.packed else (len(one), longest)
            heaviest = max(
                heaviest, (rows * tokens, rows, tokens, sum(supervised[row] for row in one))
            )
    return TokenCounts(
        real,
        labels,
        slots["literal"],
        passes["literal"],
        slots["packed"],
        passes["packed"],
        *heaviest[1:],
        share,
        fmean(excess),
        max(excess),
    )


def rows_by_source(batches: Batches, mixed: Sequence[MixedPart]) -> list[str]:
    """Lines that count the rows of a mix by source and update."""
    per_update: dict[str, list[int]] = {part.prefix: [] for part in mixed}
    for update in range(1, batches.plan.updates + 1):
        ids = [batches.rows[row].row_id for row in batches.window(update).rows]
        for prefix, counts in per_update.items():
            counts.append(sum(row_id.startswith(prefix) for row_id in ids))
    lines = []
    for part in mixed:
        counts = per_update[part.prefix]
        mean = sum(counts) / len(counts)
        lines.append(
            f"{'mix':<12} {part.name}: {sum(counts):,} rows in all updates, {min(counts)} to "
            f"{max(counts)} an update (mean {mean:.1f})"
        )
    return lines
