"""Find what stands out in a run, with commands to type."""

from __future__ import annotations

import math
import shlex
import statistics

from glassloop.record.reading import Record, RunData, number, setting
from glassloop.report.machines import slow_updates
from glassloop.report.saying import Say

MOST_TO_LOOK_AT = 6
PADDING_SHARE = 0.3  # of the computed places: worth a word from here on
ENDED_SHARE = 0.5  # of answers that should end by themselves at least
ENDED_FALL = 0.1  # of that share, against the base model: worth a warning
UNMOVED_SHARE = 0.5  # of the adapters' entries that a step leaves as they are: the same


def what_to_look_at(run: RunData) -> list[Say]:
    """List at most MOST_TO_LOOK_AT places that stand out.

    Each has the command to type. What was said already is left out.
    """
    found = [
        *_endless_answers(run),
        *_worst_row(run),
        *_largest_norm(run),
        *_padding(run),
        *(slow_updates(run) or _slowest(run)),
        *_unmoved(run),
        *_warnings(run),
    ]
    return found[:MOST_TO_LOOK_AT]


def _endless_answers(run: RunData) -> list[Say]:
    """Warn of generated answers that ran out of room instead of ending."""
    if not run.evaluations or not run.evaluations[-1]["scores"].get("answers"):
        return []
    last = run.evaluations[-1]
    now = number(last["scores"].get("ended"))
    before = number((last.get("base") or run.evaluations[0]["scores"]).get("ended"))
    fell = now is not None and before is not None and before - now >= ENDED_FALL
    if now is None or not (fell or now < ENDED_SHARE):
        return []
    length = setting(run.config, "evaluation.max_new_tokens", "unknown")
    verb = "no longer end" if fell else "do not end"
    was = "" if before is None else f" (base model: {before:.0%} end)"
    said = (
        f"{1 - now:.0%} of the adapter's answers {verb} by themselves{was}: they ran to "
        f"evaluation.max_new_tokens = {length}. Read the answers below. If they repeat themselves, "
        "lower optimizer.lr or train longer; if they are only long, raise that limit."
    )
    return [Say("look", "bad", said, last["update"] or None)]


def _worst_row(run: RunData) -> list[Say]:
    """Find the row furthest above the middle of its window."""
    by_update: dict[int, list[tuple[float, Record]]] = {}
    for row in run.rows:
        loss = number(row["loss_sum_nats"])
        if row["supervised_tokens"] and loss is not None and math.isfinite(loss):
            by_update.setdefault(row["update"], []).append((loss / row["supervised_tokens"], row))
    worst: tuple[float, float, Record] | None = None
    for rows in by_update.values():
        middle = statistics.median(loss for loss, _ in rows)
        loss, row = max(rows, key=lambda pair: pair[0])
        if middle > 0 and len(rows) >= 4 and (worst is None or loss / middle > worst[0]):
            worst = (loss / middle, loss, row)
    if worst is None or worst[0] < 2:
        return []
    factor, loss, row = worst
    said = (
        f"Row {row['row_id']} cost {loss:.3g} nats a token at update {row['update']}, {factor:.1f} "
        "times the middle of its window."
    )
    return [_look(run, said, row["update"])]


def _largest_norm(run: RunData) -> list[Say]:
    """Find a norm of 3 times the middle without an alarm."""
    norms = [
        (norm, record["update"])
        for record in run.updates
        if not record.get("alarms")
        and (norm := number(record["grad_norm_pre_clip"])) is not None
        and math.isfinite(norm)
    ]
    if len(norms) < 4:
        return []
    middle = statistics.median(norm for norm, _ in norms)
    norm, update = max(norms)
    if middle <= 0 or norm < 3 * middle:
        return []
    said = (
        f"The gradient norm of update {update} was {norm:.3g}, {norm / middle:.1f} times the "
        "middle of the run, without an alarm."
    )
    return [_look(run, said, update)]


def _look(run: RunData, said: str, update: int) -> Say:
    """A sentence on an update, with the command that looks into it."""
    command = f"glassloop replay {shlex.quote(str(run.folder))} --update {update} --bisect"
    return Say("look", "look", said, update, command)


def _padding(run: RunData) -> list[Say]:
    real = sum(sum(record["rank_real_tokens"]) for record in run.updates)
    slots = sum(sum(record["rank_slot_tokens"]) for record in run.updates)
    share = 1 - real / slots if slots else 0.0
    if share < PADDING_SHARE:
        return []
    return [
        Say(
            "look",
            "look",
            f"{share:.0%} of the computed places were padding: execution.layout=packed does the "
            "same updates without most of it.",
            command="glassloop bench --layouts literal,packed",
        )
    ]


def _slowest(run: RunData) -> list[Say]:
    later = run.updates[1:]  # the first one warms caches up
    if len(later) < 4:
        return []
    middle = statistics.median(record["update_s"] for record in later)
    slowest = max(later, key=lambda record: record["update_s"])
    if middle <= 0 or slowest["update_s"] < 3 * middle:
        return []
    said = (
        f"Update {slowest['update']} took {slowest['update_s']:.3g} s, the middle is {middle:.3g} "
        "s."
    )
    return [Say("look", "look", said, slowest["update"])]


def _unmoved(run: RunData) -> list[Say]:
    shares = [(probe["update"], number(probe.get("all_unmoved_share"))) for probe in run.probes]
    known = [(update, share) for update, share in shares if share is not None]
    if not known or known[-1][1] < UNMOVED_SHARE:
        return []
    update, share = known[-1]
    said = (
        f"At update {update} the step left {share:.0%} of the adapters' entries bit for bit as "
        "they were: lr is small for their precision."
    )
    return [Say("look", "look", said, update)]


def _warnings(run: RunData) -> list[Say]:
    kinds = ("warning", "out_of_memory")
    return [
        Say(
            "look",
            "look",
            f"{event['message'].rstrip('.')}.",
            event["update"] or None,
            event["command"],
        )
        for event in run.events
        if event["kind"] in kinds
    ]
