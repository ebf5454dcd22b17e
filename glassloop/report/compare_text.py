"""A comparison in the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from glassloop.record.printable import BREAK, printable
from glassloop.record.reading import RunData, number, setting
from glassloop.report.comparing import ComparedRuns, Comparison
from glassloop.report.machines import machine_facts
from glassloop.report.partings import Parting

MOST_DIFFERENCES = 40
SHOWN = 400  # characters of a setting


def render(found: Comparison) -> RenderableType:
    """Return tables and sentences for a rich Console.

    Texts of a run are never markup.
    """
    parts: list[RenderableType] = [_runs(found), *_machines(found), _differences(found)]
    parts.append(line(f"\nnoise floor  {found.floor:.2g} relative, {found.floor_from}"))
    for pair, side in zip(
        found.pairs, found.sides[1:] or found.sides * len(found.pairs), strict=False
    ):
        names = (
            f"{found.sides[0].label} and {side.label}"
            if len(found.sides) > 1
            else f"{pair.a.name} and {pair.b.name}"
        )
        parts.append(
            line(
                f"\n{names}: {pair.a.name} beside {pair.b.name}, {pair.compared:,} updates in "
                "common",
                style="bold",
            )
        )
        parts += [line(f"  {one}") for one in parting_lines(pair)]
        style = (
            "green" if pair.verdict.endswith("lower") or pair.verdict == "the same" else "yellow"
        )
        parts.append(line(f"  verdict on {found.measure}: {pair.verdict}", style=f"bold {style}"))
        parts.append(line(f"  {pair.why}"))
    return Group(*parts)


def parting_lines(pair: ComparedRuns) -> list[str]:
    """Where two runs part first, in sentences."""
    seeds = "" if pair.same_seed else " (their seeds differ, so other rows are no surprise)"
    went_in = (
        f"what went in   {_where(pair.went_in)}{seeds}"
        if pair.went_in
        else "what went in   the same rows, tokens and lr in every update"
    )
    came_out = (
        f"what came out  {_where(pair.came_out)}"
        if pair.came_out
        else "what came out  the same loss, norms and reactions, within the floor"
    )
    return [went_in, came_out]


def _where(parting: Parting) -> str:
    rank = "" if parting.rank is None else f", rank {parting.rank}"
    off = "" if parting.off is None else f", {parting.off:.2g} off"
    return (
        f"parts at update {parting.update}{rank}: {parting.quantity} {value(parting.a)} / "
        f"{value(parting.b)}{off}"
    )


def value(one: Any) -> str:
    """A value as people read it; "-" where there is none."""
    if one is None:
        return "-"
    return f"{one:.6g}" if isinstance(one, float) else str(one)


def line(text: str, style: str = "") -> Text:
    """Return text that a terminal shows and does not obey."""
    return Text(printable(text, keep=BREAK), style=style)


def short(one: Any) -> str:
    """Word a setting in at most SHOWN characters; "-" for none."""
    text = "-" if one is None else str(one)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def console() -> Console:
    """Wide enough for tables when the output is no terminal."""
    plain = Console(highlight=False, markup=False, emoji=False)
    return (
        plain
        if plain.is_terminal
        else Console(highlight=False, markup=False, emoji=False, width=120)
    )


def tokens_per_s(run: RunData) -> float | None:
    """Return real tokens a second over all ranks.

    It is the median of the updates after the first.
    """
    speeds = sorted(
        sum(r["rank_real_tokens"]) / r["update_s"] for r in run.updates[1:] if r["update_s"] > 0
    )
    return speeds[len(speeds) // 2] if speeds else None


def _runs(found: Comparison) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    for name in ("side", "run", "seed", "updates", "last loss", "real tok/s", found.measure):
        table.add_column(
            name, justify="left" if name in ("side", "run") else "right", overflow="fold"
        )
    for side, scores in zip(found.sides, found.scores, strict=True):
        for run, score in zip(side.runs, scores, strict=True):
            speed = tokens_per_s(run)
            cells = (
                side.label,
                run.name,
                str(setting(run.config, "seed", "-")),
                f"{run.updates[-1]['update']:,}/{run.planned_updates:,}",
                value(number(run.updates[-1]["loss_nats"])),
                "-" if speed is None else f"{speed:,.0f}",
                value(score),
            )
            table.add_row(*map(line, cells))
    return table


def _machines(found: Comparison) -> list[RenderableType]:
    """A table of the runs' machines, as far as they were read."""
    facts = [machine_facts(run) for run in found.runs]
    names = [name for name in facts[0] if any(one[name] is not None for one in facts)]
    if not names:
        return []
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("machine, medians")
    for run in found.runs:
        table.add_column(line(run.name), justify="right", overflow="fold")
    for name in names:
        table.add_row(line(name), *(line(value(one[name])) for one in facts))
    return [line(""), table]


def _differences(found: Comparison) -> RenderableType:
    if not found.differences:
        return line(
            "\nNothing was asked differently: config, versions, code and hardware are the same."
        )
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("field")
    for run in found.runs:
        table.add_column(line(run.name), overflow="fold")
    for name, values in found.differences[:MOST_DIFFERENCES]:
        table.add_row(line(name), *(line(short(one)) for one in values))
    more = len(found.differences) - MOST_DIFFERENCES
    return Group(
        line("\nAsked differently", style="bold"),
        table,
        *([line(f"and {more} more")] if more > 0 else []),
    )
