"""A replay in plain lines of at most WIDTH columns.

Tables are aligned by spaces.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from glassloop.record.printable import visible

if TYPE_CHECKING:
    from glassloop.replay.bisect import Bisection, Part, TokenLoss
    from glassloop.replay.matrices import MatrixStat
    from glassloop.replay.reproduce import Reproduction
    from glassloop.replay.start import Opened
    from glassloop.replay.trials import Trials

WIDTH = 120
MOST_LINES = 10  # of a table whose worst lines are shown
AROUND = 6  # supervised places on each side of the worst one


def table(heading: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Aligned columns, the first `left` of them to the left."""
    lines = [list(heading), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heading))]
    return [
        "  "
        + "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def wrapped(label: str, text: str) -> list[str]:
    """`label   text`, continued under the text."""
    first, others = f"{label:<10}", " " * 10
    lines = textwrap.wrap(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=others,
        break_on_hyphens=False,
        break_long_words=False,
    )
    return lines or [label]


def progress(line: str) -> list[str]:
    """Lines for updates that are re-run on the way."""
    return [line] if line.startswith(" ") else wrapped("start", line)


def opening(opened: Opened) -> list[str]:
    scene = opened.scene
    ranks = f"{scene.ranks} ranks, run one after the other" if scene.ranks > 1 else "1 rank"
    passes = sum(map(len, scene.window.passes))
    lines = wrapped("update", f"{scene.update}, from {scene.origin}")
    lines += wrapped(
        "",
        f"{len(scene.window.rows)} rows, {scene.supervised_tokens:,} supervised tokens, "
        f"{passes} passes on {ranks}; lr {scene.lr:.3g}",
    )
    if opened.usual is not None:
        lines += wrapped(
            "usual",
            f"loss {opened.usual[0]:.4f}, gradient norm {opened.usual[1]:.4g} "
            f"({opened.usual_from})",
        )
    for note in opened.notes:
        lines += wrapped("note", note)
    return lines


def reproduction(opened: Opened, done: Reproduction) -> list[str]:
    lines = ["", "Against the record"]
    shown = [
        c
        for c in done.compared
        if not c.name.startswith("loss of ") or c.name.startswith("loss of rank ")
    ]
    rows = [c for c in done.compared if c not in shown]
    body = [
        [c.name, number(c.recorded, 9), number(c.replayed, 9), off(c.off), off(c.allowed)]
        for c in shown
    ]
    if rows:
        worst = max(rows, key=lambda c: c.off)
        name = f"{len(rows)} row losses, worst: {worst.name.removeprefix('loss of ')}"
        body.append(
            [
                name,
                number(worst.recorded, 9),
                number(worst.replayed, 9),
                off(worst.off),
                off(worst.allowed),
            ]
        )
    lines += table(["", "recorded", "replayed", "off", "allowed"], body)
    floors = (
        f"loss {off(done.loss_floor)}, gradient norm {off(done.norm_floor)}, gradient "
        f"{off(done.grad_floor)}"
    )
    return [*lines, f"  noise floor, two replays apart: {floors}"]


def bisection(
    opened: Opened, found: Bisection, decode: Callable[[list[int]], str] | None
) -> list[str]:
    lines: list[str] = []
    if len(found.ranks) > 1:
        lines += [
            "",
            "By rank; factors are over the median of the others",
            *parts(found.ranks, found.rank),
        ]
    if len(found.passes) > 1:
        lines += [
            "",
            "By pass; factors are over the median of the others",
            *parts(found.passes, found.one_pass),
        ]
    lines += [
        "",
        "By row, each alone; factors are over the median of the others",
        *parts(found.rows, found.row),
    ]
    if opened.healthy is not None and found.healthy_rows is not None:
        loss, norm = map(number, found.healthy_rows)
        lines += [
            f"    median row of the healthy update {opened.healthy.update}: loss {loss} a "
            f"token, gradient norm {norm}"
        ]
    than = (
        f"the healthy update {opened.healthy.update}"
        if opened.healthy
        else "the other layers' median"
    )
    lines += [
        "",
        f"By adapter matrix, of {found.looked_at}; factors are over {than}",
        *matrices(found.matrices),
    ]
    if found.layer is not None:
        lines += wrapped("  layer", found.layer.message)
    if found.tokens:
        lines += [
            "",
            f"Tokens of {found.token_row}, supervised places only",
            *tokens(found.tokens, decode, opened.text),
        ]
    return lines


def parts(of: Sequence[Part], suspect: Part | None) -> list[str]:
    """Worst first: what is not finite, then by gradient norm."""
    ordered = sorted(of, key=lambda part: (part.finite, -part.grad_norm if part.finite else 0))
    body = [
        [
            ("> " if suspect and part.name == suspect.name else "  ") + part.name,
            f"{part.supervised_tokens:,}",
            number(part.loss_nats),
            factor(part.loss_factor),
            number(part.grad_norm),
            factor(part.norm_factor),
            "-" if part.norm_share is None else f"{part.norm_share:.0%}",
        ]
        for part in ordered[:MOST_LINES]
    ]
    lines = table(["", "tokens", "loss/token", "x", "grad norm", "x", "share"], body)
    return lines + (
        [f"    and {len(ordered) - MOST_LINES} more"] if len(ordered) > MOST_LINES else []
    )


def matrices(stats: Sequence[MatrixStat]) -> list[str]:
    """The furthest from what they are compared with first."""
    ordered = sorted(stats, key=lambda s: (-_trouble(s), s.layer))
    body = [
        [
            s.name,
            number(s.weight_norm),
            factor(s.weight_factor),
            number(s.grad_norm),
            factor(s.grad_factor),
        ]
        for s in ordered[:MOST_LINES]
    ]
    lines = table(["", "weight norm", "x", "grad norm", "x"], body)
    return lines + (
        [f"    and {len(ordered) - MOST_LINES} more"] if len(ordered) > MOST_LINES else []
    )


def _trouble(s: MatrixStat) -> float:
    if not (math.isfinite(s.weight_norm) and math.isfinite(s.grad_norm)):
        return math.inf
    factors = [f for f in (s.weight_factor, s.grad_factor) if f is not None]
    return max(factors, default=0.0)


def tokens(
    of: Sequence[TokenLoss], decode: Callable[[list[int]], str] | None, policy: str
) -> list[str]:
    """The worst places, then those around the worst one in order.

    Text only under record.text = full, no ids under none.
    """

    def line(token: TokenLoss, mark: str = "  ") -> list[str]:
        cells = [f"{mark}{token.position}", number(token.loss_nats)]
        if policy != "none":
            cells.append(str(token.token_id))
        if decode is not None:
            cells.append(visible(decode([token.token_id]))[:40])
        return cells

    heading = [
        "  place",
        "loss",
        *(["token id"] if policy != "none" else []),
        *(["text"] if decode is not None else []),
    ]
    ordered = sorted(
        of, key=lambda t: t.loss_nats if math.isfinite(t.loss_nats) else math.inf, reverse=True
    )
    worst = of.index(ordered[0])
    near = of[max(0, worst - AROUND) : worst + AROUND + 1]
    lines = ["  worst first", *table(heading, [line(token) for token in ordered[:MOST_LINES]])]
    if len(of) > MOST_LINES or len(near) > 1:
        lines += [f"  around place {ordered[0].position}, in order"]
        lines += table(
            heading, [line(token, "> " if token is ordered[0] else "  ") for token in near]
        )
    return lines


def trials(opened: Opened, done: Trials) -> list[str]:
    body = [
        [
            trial.name
            if not trial.note or trial.note.startswith("not tried")
            else f"{trial.name} ({trial.note})",
            number(trial.loss_nats),
            number(trial.grad_norm),
            number(trial.clip_coef),
            number(trial.change),
            number(trial.loss_after_nats),
            off(trial.grad_off) if trial.grad_off is not None else "-",
        ]
        for trial in done.trials
        if not trial.note.startswith("not tried")
    ]
    lines = ["", "With one thing changed at a time"]
    lines += table(
        ["", "loss", "grad norm", "clip", "|change|", "loss after", "gradient off"], body
    )
    for trial in done.trials:
        if trial.note.startswith("not tried"):
            lines += wrapped("", f"{trial.name}: {trial.note}")
    return lines


def conclusion(
    opened: Opened, done: Reproduction, found: Bisection | None, trials: Trials | None
) -> str:
    """One sentence: reproduced or not, what stands out, the trials' verdict."""
    said = [_reproduces(opened, done)]
    if found is not None:
        said.append(_stands_out(found))
    if trials is not None:
        said.append(f"cause: {trials.verdict.kind} ({trials.verdict.why})")
    return "; ".join(said)


def _reproduces(opened: Opened, done: Reproduction) -> str:
    if done.reproduces is None:
        return "nothing is on record to compare with"
    if done.bit_for_bit:
        return "reproduced bit for bit"
    if done.reproduces:
        worst = max(done.compared, key=lambda c: c.off)
        return f"reproduced within the noise floor ({worst.name} is off by {off(worst.off)})"
    worst = max((c for c in done.compared if not c.reproduces), key=lambda c: c.off)
    way = next((one for one in opened.on_the_way if max(one.loss_off, one.norm_off) > 0), None)
    if way is not None:
        why = (
            f"update {way.update}, on the way, was off already by "
            f"{off(max(way.loss_off, way.norm_off))}"
        )
    elif opened.notes:
        why = opened.notes[0]
    else:
        why = (
            "rows, adapters, optimizer and random numbers are the recorded ones: look at "
            "hardware, kernels and threads"
        )
    values = f"was {number(worst.recorded)}, is {number(worst.replayed)}"
    return (
        f"not reproduced: {worst.name} {values}, off by {off(worst.off)} where "
        f"{off(worst.allowed)} is allowed ({why})"
    )


def _stands_out(found: Bisection) -> str:
    said = "every row is affected" if found.everything else "no row stands out"
    if found.row is not None:
        part = found.row
        amount = (
            "not finite"
            if not part.finite
            else f"norm {factor(part.norm_factor)}, loss {factor(part.loss_factor)} the median"
        )
        said = (
            f"row {part.name.removeprefix('row ')} (rank {part.rank}, pass {part.index}) "
            f"stands out: {amount}"
        )
    return f"{said}; {found.layer.name} is off" if found.layer is not None else said


def number(value: float | None, digits: int = 4) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}g}" if math.isfinite(value) else str(value)


def off(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def factor(value: float | None) -> str:
    if value is None:
        return "-"
    return (
        f"{value:,.1f}x"
        if math.isfinite(value) and value < 100
        else f"{value:,.0f}x"
        if math.isfinite(value)
        else str(value)
    )
