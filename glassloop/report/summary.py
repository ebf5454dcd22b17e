"""Sum a run up in plain words.

Every sentence rests on a record.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence

from glassloop.record.reading import Record, RunData, number, setting
from glassloop.report.saying import Say, command_at, times
from glassloop.report.standouts import what_to_look_at

SCORES = {  # of an evaluation, with what people call them; higher is better
    "accuracy": "accuracy",
    "f1": "F1",
    "closed_think": "answers that close their reasoning",
    "ended": "answers that end by themselves",
    "no_verdict": "answers that name a verdict",  # one minus the score
}


def summarise(run: RunData) -> list[Say]:
    """The summary, in the order in which it is read."""
    if not run.updates:
        ended = how_it_ended(run)
        return [
            ended,
            Say(
                "learned",
                "unknown",
                "No update is on record yet, so there is nothing to say of learning or stability.",
            ),
        ]
    stable = was_it_stable(run)
    calm = all(one.verdict == "good" for one in stable)
    nothing = Say("look", "good", f"Nothing {'' if calm else 'else '}stands out.")
    return [how_it_ended(run), *did_it_learn(run), *stable, *(what_to_look_at(run) or [nothing])]


def how_it_ended(run: RunData) -> Say:
    """Finished, failed, stopped, or no word of an end."""
    done = run.updates[-1]["update"] if run.updates else 0
    applied = sum(record["action"] == "applied" for record in run.updates)
    count = f"{done:,} of {run.planned_updates:,} updates done, {applied:,} of them applied"
    again = (
        f"; {times(len(run.replaced), 'was', 'were')} done again after a resume"
        if run.replaced
        else ""
    )
    end = run.end
    if end is None:
        return Say(
            "ended",
            "look",
            f"No end is on record: the run is still going, or it was broken off. {count}{again}.",
            done or None,
        )
    if run.ended_early:
        message = f"The run {end['message']}. {count}{again}."
        return Say("ended", "good", message, end["update"] or None)
    if end["kind"] == "finished":
        return Say("ended", "good", f"The run finished: {count}{again}.")
    how = "was stopped on demand" if end["kind"] == "stopped" else "failed"
    verdict = "look" if end["kind"] == "stopped" else "bad"
    return Say(
        "ended",
        verdict,
        f"The run {how}: {end['message']}. {count}{again}.",
        end["update"] or None,
        end["command"],
    )


def did_it_learn(run: RunData) -> list[Say]:
    """Judge by held-out rows, else by the training loss.

    Repeated rows lower the training loss by themselves.
    """
    said = []
    scored = [(record["update"], number(record["loss_nats"])) for record in run.evaluations]
    heldout = [
        (update, loss) for update, loss in scored if loss is not None and math.isfinite(loss)
    ]
    if run.ended_early and len(heldout) >= 2:  # its result is an earlier checkpoint
        best_update, _ = min(heldout[1:], key=lambda pair: pair[1])
        heldout = [pair for pair in heldout if pair[0] <= best_update]
    if len(heldout) >= 2:
        said.append(_heldout(heldout, run.evaluations[-1]))
        said += _scores(run.evaluations)
    said.append(_training_loss(run, alone=not said))
    return said


def was_it_stable(run: RunData) -> list[Say]:
    """Updates that were not applied, alarms, clipping, numbers that are not finite."""
    skipped = [record for record in run.updates if record["action"] == "skipped"]
    alarmed = [record for record in run.updates if record.get("alarms")]
    kinds = Counter(kind.replace("_", " ") for record in alarmed for kind in record["alarms"])
    said = []
    if skipped:
        first = skipped[0]
        said.append(
            Say(
                "stable",
                "bad",
                f"{times(len(skipped), 'update was', 'updates were')} skipped, first update "
                f"{first['update']}: {first['reason']}.",
                first["update"],
                command_at(run, first["update"]),
            )
        )
    if alarmed:
        names = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
        said.append(
            Say(
                "stable",
                "look",
                f"Detectors raised an alarm at {times(len(alarmed), 'update', 'updates')} "
                f"({names}), first at update {alarmed[0]['update']}.",
                alarmed[0]["update"],
                command_at(run, alarmed[0]["update"]),
            )
        )
    norms = [
        norm
        for record in run.updates
        if record["action"] == "applied"
        and (norm := number(record["grad_norm_pre_clip"])) is not None
        and math.isfinite(norm)
    ]
    if not said:
        calm = (
            f": the gradient norm stayed between {min(norms):.3g} and {max(norms):.3g} before "
            "clipping"
            if norms
            else ""
        )
        said.append(Say("stable", "good", f"Every update was applied and no detector spoke{calm}."))
    clips = [clip for one in run.updates if (clip := number(one["clip_coef"])) is not None]
    clipped = sum(value < 1 for value in clips)
    if clips and clipped / len(clips) > 0.5:
        mean = statistics.fmean(clips)
        said.append(
            Say(
                "stable",
                "look",
                f"Clipping decided the size of most updates: {clipped:,} of {len(clips):,} were "
                f"clipped, to {mean:.0%} of their norm on average "
                "(optimizer.max_grad_norm = "
                f"{setting(run.config, 'optimizer.max_grad_norm', 'unknown')}).",
            )
        )
    return said


def trend(values: Sequence[float]) -> tuple[float, float, float]:
    """Return (first mean, last mean, standard error of the difference).

    The means are of the first and last fifth, of 3 values or more each.
    """
    size = max(3, len(values) // 5)
    first, last = values[:size], values[-size:]
    error = math.sqrt(statistics.variance(first) / size + statistics.variance(last) / size)
    return statistics.fmean(first), statistics.fmean(last), error


def _heldout(heldout: list[tuple[int, float]], last_record: Record) -> Say:
    (first_update, first), (last_update, last) = heldout[0], heldout[-1]
    best_update, best = min(heldout, key=lambda pair: pair[1])
    rows = (
        f"on {last_record['rows']:,} held-out rows ({last_record['supervised_tokens']:,} "
        "supervised tokens)"
    )
    change = (
        f"from {first:.4g} nats a token after update {first_update} to {last:.4g} after update "
        f"{last_update}, {rows}"
    )
    if last >= first:
        return Say(
            "learned",
            "bad",
            f"It did not learn what it was asked: held-out loss went {change}.",
            last_update,
        )
    if best < last and (last - best) > 0.05 * (first - best):
        return Say(
            "learned",
            "look",
            f"It learned, then lost some of it: held-out loss went {change}; it was lowest, "
            f"{best:.4g}, after update {best_update}. "
            "checkpoints/best.json names the checkpoint to use.",
            best_update,
        )
    return Say(
        "learned",
        "good",
        f"It learned: held-out loss fell {change} ({(first - last) / first:.0%} lower).",
        last_update,
    )


def _scores(evaluations: list[Record]) -> list[Say]:
    last = evaluations[-1]
    before = last.get("base") or evaluations[0]["scores"]
    parts = []
    for key, name in SCORES.items():
        old, new = number(before.get(key)), number(last["scores"].get(key))
        if old is not None and new is not None:
            if key == "no_verdict":
                old, new = 1 - old, 1 - new
            parts.append(f"{name} {old:.0%} to {new:.0%}")
    answers = last["scores"].get("answers")
    if not parts or not answers or not isinstance(answers, int):
        return []
    few = " So few answers say little." if answers < 30 else ""
    return [
        Say(
            "learned",
            "unknown" if few else "look",
            f"Generated answers, base model to now, {answers:,} rows: {', '.join(parts)}.{few}",
        )
    ]


def _training_loss(run: RunData, *, alone: bool) -> Say:
    losses = [
        loss
        for record in run.updates
        if record["action"] == "applied"
        and (loss := number(record["loss_nats"])) is not None
        and math.isfinite(loss)
    ]
    if len(losses) < 6:
        return Say(
            "learned",
            "unknown",
            f"{times(len(losses), 'update', 'updates')} with a loss: too few to tell a trend from "
            "scatter.",
        )
    first, last, error = trend(losses)
    passes = run.updates[-1]["epoch"] + 1
    repeated = f" Rows were seen up to {passes} times, which alone lowers it." if passes > 1 else ""
    without = (
        " No rows were held out, so this is no proof that it learned more than these rows."
        if alone
        else ""
    )
    moved = f"from {first:.4g} to {last:.4g} nats a token (first and last fifth of the updates)"
    if abs(first - last) <= 2 * error:
        return Say(
            "learned",
            "look",
            f"Training loss did not move beyond its scatter: {moved}, give or take "
            f"{2 * error:.2g}.{without}",
        )
    if last > first:
        return Say("learned", "bad", f"Training loss rose {moved}.{without}")
    return Say(
        "learned", "look" if alone else "good", f"Training loss fell {moved}.{repeated}{without}"
    )
