"""Show a study in the terminal: settings, claims, verdicts."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from glassloop.record.printable import printable
from glassloop.report.compare_text import line
from glassloop.study.answers import Answers
from glassloop.study.critical import lines
from glassloop.study.quantities import QUANTITIES
from glassloop.study.results import Group, Spread
from glassloop.study.spec import Study
from glassloop.study.verdicts import CONTRADICTED, SUPPORTED

STYLES = {SUPPORTED: "green", CONTRADICTED: "red"}
SHORT = {  # column heads; the page has the whole words
    "heldout_loss": "held-out",
    "heldout_gain": "fall",
    "heldout_rise": "rise",
    "train_loss": "train",
    "overfit_gap": "gap",
    "norm_median": "norm",
    "norm_scatter": "scatter",
    "norm_peak": "peak/mid",
    "spikes": "spikes",
    "clip_share": "clipped",
    "noise_scale": "noise tok",
    "update_ratio": "step/w",
    "diverged": "diverged",
    "load_gib": "load GiB",
    "adapters_gib": "adapt GiB",
    "peak_gib": "peak GiB",
    "update_s": "s/update",
    "tokens_per_s": "tok/s",
    "rows_seen": "rows",
}


def columns_of(study: Study, groups: Sequence[Group]) -> list[str]:
    """List the quantities that the study asks for and has."""
    claimed = {claim.quantity for claim in study.claims}
    return [
        name
        for name, one in QUANTITIES.items()
        if (one.measure in study.measure or name in claimed)
        and any(group.spread(name).by_seed for group in groups)
    ]


def render(answers: Answers) -> RenderableType:
    """Tables by measure and sentences, for a rich Console."""
    parts: list[RenderableType] = [
        line(f"\n{answers.study.name}: {answers.study.question}", style="bold")
    ]
    shown = columns_of(answers.study, answers.groups)
    for measure in ("loss", "stability", "memory", "time"):
        if names := [name for name in shown if QUANTITIES[name].measure == measure]:
            parts += [
                line(f"\n{measure}: mean, and standard deviation over seeds"),
                _table(answers.groups, names),
            ]
    for result in answers.results:
        if result.kind in ("partial", "absent", "other"):
            parts.append(line(f"  no result: {result.cell.name}: {result.why}", style="yellow"))
    if answers.judged:
        parts.append(line("\nclaims", style="bold"))
    for one in answers.judged:
        parts.append(
            line(
                f"  {one.verdict}: {one.claim.says}",
                style=f"bold {STYLES.get(one.verdict, 'yellow')}",
            )
        )
        parts.append(line(f"    {one.claim.quantity}: {one.why}"))
    for found in answers.critical:
        parts += [
            line("\ncritical accumulation", style="bold"),
            *(line(f"  {one}") for one in lines(found)),
        ]
    for one in answers.diverged:
        parts.append(line(f"\ndiverged: {one.cell}, update {one.update}, {one.why}"))
        # Whole, to be copied.
        parts.append(Text(printable(f"  {one.command}"), no_wrap=True, overflow="ignore"))
        if one.answer:
            parts += [line(f"    {said}") for said in one.answer.strip().splitlines()[-12:]]
    if answers.study.cannot_say:
        parts.append(line(f"\nwhat this cannot say: {answers.study.cannot_say}"))
    return Lines(*parts)


def spread_text(spread: Spread) -> str:
    """Word a mean and deviation: "1.234 ± 0.02".

    The mean stands alone with one seed; "-" without a value.
    """
    if spread.mean is None:
        return "-"
    return f"{spread.mean:.4g}" + ("" if spread.deviation is None else f" ±{spread.deviation:.2g}")


def _table(groups: Sequence[Group], names: Sequence[str]) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("setting", no_wrap=True)
    table.add_column("seeds", justify="right")
    for name in names:
        table.add_column(SHORT[name], justify="right", overflow="fold")
    for group in groups:
        cells = [
            group.name,
            f"{group.finished}/{len(group.results)}",
            *(spread_text(group.spread(name)) for name in names),
        ]
        table.add_row(*map(line, cells))
    return table
