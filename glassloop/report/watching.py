"""Show a growing run as one screen of a terminal.

Only what is new is read.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from glassloop.record.printable import printable
from glassloop.record.reading import Record, number
from glassloop.record.terminal import STYLES
from glassloop.report.following import Watched
from glassloop.report.machines import last_reading

BLOCKS = "▁▂▃▄▅▆▇█"
SILENT = 5.0  # times the usual time of an update without a new one: worth a word
# Kinds of events; of checkpoints the last is.
NOT_SHOWN = ("started", "preflight", "memory", "capsule", "checkpoint")
LABEL = 12  # columns before a curve


class Screen:
    """A run in as many lines as the terminal has."""

    def __init__(self, watched: Watched) -> None:
        self.watched = watched

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield screen(self.watched, options.max_width, (options.height or console.height or 24) - 1)


def screen(watched: Watched, width: int, height: int) -> RenderableType:
    """Lay out state, curves, last updates and last events.

    Older ones give way if there is no room.
    """
    curves = _curves(watched, width) if watched.updates else []
    ranks = (
        [] if watched.end is not None else [_rank_line(one, width) for one in watched.ranks()[:8]]
    )
    saved = [event for event in watched.events if event["kind"] == "checkpoint"][-1:]
    events = [event for event in watched.events if event["kind"] not in NOT_SHOWN or event in saved]
    room = height - 2 - len(curves) - len(ranks)
    noticed = _events(events, max(1, min(len(events), room // 3)), width)
    # The table's heading.
    room -= sum(1 if isinstance(line, Text) and line.no_wrap else 2 for line in noticed) + 1
    table = [_updates(watched.updates[-room:])] if watched.updates and room > 0 else []
    parts: list[RenderableType] = [_state(watched, width), *curves, *table, *ranks, *noticed]
    return Group(*parts)


def sparkline(values: Sequence[float | None], width: int, *, largest: bool = False) -> str:
    """Draw values in `width` characters, low to high.

    Several share a character by their mean, or by their largest.

    A blank where there is no value, ✕ where one is not finite, ↑ where one stands so far above the
    rest that it would flatten them.
    """
    if not values:
        return ""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    cells: list[float | None] = []
    for first, after in pairwise(edges):
        known = [value for value in values[first:after] if value is not None]
        broken = any(not math.isfinite(value) for value in known)
        cells.append(
            math.nan
            if broken
            else (max(known) if largest else statistics.fmean(known))
            if known
            else None
        )
    sound = [cell for cell in cells if cell is not None and math.isfinite(cell)]
    low, high = (min(sound), max(sound)) if sound else (0.0, 0.0)
    most = sorted(sound)[int(0.9 * (len(sound) - 1))] if sound else 0.0
    cap = most if high - low > 4 * (most - low) > 0 else math.inf
    span = (min(high, cap) - low) or 1.0

    def block(cell: float | None) -> str:
        if cell is None:
            return " "
        if cell > cap + span:
            return "↑"
        return BLOCKS[min(7, int(8 * (cell - low) / span))] if math.isfinite(cell) else "✕"

    return "".join(map(block, cells))


def _state(watched: Watched, width: int) -> RenderableType:
    end, done = watched.end, watched.updates[-1]["update"] if watched.updates else 0
    usual = (
        statistics.median(record["update_s"] for record in watched.updates[-20:])
        if watched.updates
        else None
    )
    if end is not None:
        style = {"finished": "green", "stopped": "yellow"}.get(end["kind"], "red")
        words = end["kind"] if end["kind"] == "finished" else f"{end['kind']}: {end['message']}"
    else:
        style, words = "cyan", "running" if watched.updates else "no update yet"
        silent = watched.silent_s()
        if silent is not None and usual is not None and silent > max(30.0, SILENT * usual):
            style, words = (
                "yellow",
                f"no new update for {_duration(silent)}, one takes {usual:.3g} s: evaluating, "
                "saving, waiting, or broken off",
            )
        elif usual is not None:
            words += (
                f", about {_duration(usual * (watched.planned - done))} left without evaluations "
                "and checkpoints"
            )
    head = (
        f"{watched.folder.resolve().name}  {done:,}/{watched.planned:,} updates  "
        if watched.planned
        else f"{watched.folder.resolve().name}  "
    )
    share = done / watched.planned if watched.planned else 0.0
    filled = int(share * (width - 8))
    bar = (
        Text("━" * filled, style=style)
        + Text("─" * (width - 8 - filled), style="dim")
        + Text(f" {share:4.0%}")
    )
    line = Text(printable(head), style="bold") + Text(printable(words), style=style)
    line.no_wrap, line.overflow = True, "ellipsis"
    return Group(line, bar)


def _curves(watched: Watched, width: int) -> list[RenderableType]:
    room = max(10, width - LABEL - 12)
    last = watched.updates[-1]
    lines: list[RenderableType] = []
    for label, name, largest in (
        ("loss nats", "loss_nats", False),
        ("norm", "grad_norm_pre_clip", True),
        ("lr", "lr", False),
    ):
        values = [number(record[name]) for record in watched.updates]
        line = Text(f"{label:<{LABEL}}") + Text(
            sparkline(values, room, largest=largest), style="cyan"
        )
        lines.append(line + Text(f"  {_value(values[-1])}"))
    if watched.evaluations:
        first, newest = watched.evaluations[0], watched.evaluations[-1]
        text = (
            f"after update {newest['update']}: {_value(number(newest['loss_nats']))}, first "
            f"{_value(number(first['loss_nats']))}"
        )
        lines.append(Text(f"{'held-out':<{LABEL}}{text}", no_wrap=True, overflow="ellipsis"))
    speed = sum(last["rank_real_tokens"]) / last["update_s"] if last["update_s"] > 0 else None
    peak = max(last["rank_peak_gib"]) if last.get("rank_peak_gib") else None
    padding = (
        1 - sum(last["rank_real_tokens"]) / sum(last["rank_slot_tokens"])
        if sum(last["rank_slot_tokens"])
        else None
    )
    facts = [
        "" if speed is None else f"{speed:,.0f} real tokens/s, all ranks",
        "" if padding is None else f"{padding:.0%} padding",
        "" if peak is None else f"peak {peak:.2f} GiB",
        last_reading(watched.machine[-1] if watched.machine else None),
    ]
    lines.append(
        Text(
            f"{'last update':<{LABEL}}{', '.join(filter(None, facts))}",
            overflow="ellipsis",
            no_wrap=True,
        )
    )
    return lines


def _updates(records: Sequence[Record]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", collapse_padding=True)
    for name in ("update", "epoch", "lr", "loss nats", "norm pre-clip", "clip", "tokens", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, overflow="ellipsis")
    for record in records:
        alarms = ", ".join(record.get("alarms") or ()).replace("_", " ")
        note = f"SKIPPED: {record['reason']}" if record["action"] == "skipped" else alarms
        style = "red" if record["action"] == "skipped" else "yellow" if alarms else ""
        clip = number(record["clip_coef"])
        cells = (
            str(record["update"]),
            str(record["epoch"]),
            f"{record['lr']:.2e}",
            _value(number(record["loss_nats"])),
            _value(number(record["grad_norm_pre_clip"])),
            "-" if clip is None else "" if clip >= 1 else f"{clip:.3f}",
            f"{record['supervised_tokens']:,}",
            f"{record['update_s']:.2f}",
            printable(note),
        )
        table.add_row(*map(Text, cells), style=style)
    return table


def _rank_line(position: dict[str, Any], width: int) -> Text:
    since = position.get("since")
    waited = "an unknown time"
    if isinstance(since, int | float) and abs(since) < 2 * time.time():
        waited = _duration(max(0.0, time.time() - since))
    text = (
        f"rank {position.get('rank')}: update {position.get('update')}, {position.get('doing')}, "
        f"for {waited}"
    )
    return Text(printable(text)[:width], style="dim")


def _events(events: Sequence[Record], most: int, width: int) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for event in events[-most:]:
        text = printable(f"[{event['update']}] {event['kind']}: {event['message']}")
        lines.append(
            Text(text, style=STYLES.get(event["kind"], ""), no_wrap=True, overflow="ellipsis")
        )
    last = next((event for event in reversed(events) if event["command"]), None)
    if last is not None:
        lines.append(Text(printable(f"type: {last['command']}"), style="bold", overflow="fold"))
    return lines


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
    )
