"""A model card's results with their uncertainty, and what was not measured."""

from __future__ import annotations

from glassloop.use.card.escape import words
from glassloop.use.card.facts import Facts
from glassloop.use.measuring import Score

NONE = {"precision": "no answer says scam", "recall": "no row is labelled scam"}
NAMES = {"loss_nats": "loss, nats a token", "f1": "F1"}


def evaluation(facts: Facts) -> str:
    found = facts.evaluated
    if found is None:
        return recorded(facts)
    which = "the run's held-out rows"
    if not found.own_heldout:
        which = "other rows than the run's held-out ones"
    whose = "this model" if not facts.merge else "the adapter, before it was merged"
    lines = [
        f"{found.rows} rows ({which}), {found.supervised_tokens:,} supervised tokens; "
        f"{found.answered} answered greedily with at most {found.max_new_tokens} tokens, "
        f"{found.verdict_rows} of them labelled. Brackets: 95 % intervals (loss, F1 and "
        "differences: bootstrap over rows, paired; shares: Wilson).",
        "",
        f"| | base | {whose} | difference |",
        "| --- | --- | --- | --- |",
    ]
    for score in found.scores:
        name = words(NAMES.get(score.name, score.name))
        cells = cell(score, "base"), cell(score, "adapter"), difference(score)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    silent = [found.counts.get(side, {}).get("no_verdict") for side in ("base", "adapter")]
    base, own = silent
    if found.verdict_rows and base is not None and own is not None:
        lines += [
            "",
            f"Answers without a verdict count as wrong: {base:.0%} of the base's, {own:.0%} of "
            f"{whose.partition(',')[0]}'s.",
        ]
    return "\n".join([*lines, *merge_table(facts)])


def cell(score: Score, side: str) -> str:
    value, interval = score.values.get(side), score.intervals.get(side)
    if value is None:
        return NONE.get(score.name, "no rows count for it")
    return f"{value:.4f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def difference(score: Score) -> str:
    base, own = score.values.get("base"), score.values.get("adapter")
    if base is None or own is None:
        return ""
    low_high = score.difference
    interval = f" [{low_high[0]:+.3f}, {low_high[1]:+.3f}]" if low_high else ""
    p = f", exact McNemar p = {score.p:.3g}" if score.p is not None else ""
    return f"{own - base:+.4f}{interval}{p}"


def recorded(facts: Facts) -> str:
    """Report the run's own evaluation, which has no intervals."""
    ours = [
        e
        for e in (facts.run.evaluations if facts.run else [])
        if e["update"] == facts.trained.state.update
    ]
    if not ours:
        return "\n".join(["Not evaluated.", *merge_table(facts)])
    last = ours[-1]
    base = (last.get("base") or {}).get("loss_nats")
    against = f" (base {float(base):.4f})" if base is not None else ""
    text = (
        f"Held-out loss {float(last['loss_nats']):.4f} nats a token{against}, {int(last['rows'])} "
        "rows. No interval: `glassloop evaluate` was not run."
    )
    return "\n".join([text, *merge_table(facts)])


def merge_table(facts: Facts) -> list[str]:
    table = facts.merge.table if facts.merge else ()
    if not table:
        return []
    head = [
        "",
        f"What merging changed, on {table[0].rows} held-out rows ({table[0].tokens:,} tokens):",
        "",
        "| weights | loss, nats | same next token as the adapter as trained |",
        "| --- | --- | --- |",
    ]
    return head + [
        f"| {words(one.name)} | {one.loss_nats:.4f} | {one.agreement:.2%} |" for one in table
    ]


def not_measured(facts: Facts) -> list[str]:
    """List what a reader of the card cannot see is missing."""
    found = facts.evaluated
    lines = []
    if found is None:
        lines.append(
            "Scores against the base with their uncertainty: `glassloop evaluate` was not run on "
            "these weights."
        )
    else:
        if not found.verdict_rows:
            lines.append(
                "Whether answers are right: the rows have no labels, or none was answered."
            )
        elif found.verdict_rows < 100:
            lines.append(
                f"Anything finer than the intervals above: {found.verdict_rows} labelled rows tell "
                "little."
            )
        if not found.own_heldout:
            lines.append("Loss on the run's own held-out rows.")
    lines += [
        "Other seeds: this is one run, and the spread between seeds is not in the intervals.",
        "Rows from another source than the training data's.",
        "What the base could do before and may do worse now (general benchmarks), safety, bias, "
        "other languages.",
        "Whether its reasoning is what led to its answer.",
    ]
    if facts.merge:
        shown = facts.merge.table
        lines.append(
            "Answers of the merged weights: "
            + ("the table compares loss and next tokens." if shown else "they were not asked.")
        )
        if not shown:
            lines.append("What merging changed (it was merged without the table).")
    if not facts.merge:
        lines.append(
            "The adapter on another form of the base (16-bit or another quantisation) than the one "
            "it was trained on."
        )
    if facts.trained.config.data.format == "scam" or facts.trained.config.data.source == "sample":
        lines.append("Use on real calls. Do not let it decide whether a real call can be trusted.")
    return lines
