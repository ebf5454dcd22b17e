"""The machine of a run, for the page, the terminal and comparisons."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any

from glassloop.record.reading import Record, RunData
from glassloop.report.columns import column
from glassloop.report.saying import Say, times

SHOWN = {  # column of the page: field of MachineRecord
    "clock": "rank_sm_clock_mhz",
    "power": "rank_power_w",
    "heat": "rank_temperature_c",
    "busy": "rank_card_busy",
    "host_gib": "rank_host_gib",
}


def machine_columns(run: RunData) -> dict[str, Any]:
    """Columns by rank for the page's figures.

    Those that nobody read are left out.
    """
    records = {record["update"]: record for record in run.machine}
    found: dict[str, Any] = {}
    for name, field in SHOWN.items():
        if any(record[field] is not None for record in run.machine):
            found[name] = [
                column(_of(records.get(one["update"]), field, rank) for one in run.updates)
                for rank in range(run.ranks)
            ]
    return found


def slow_updates(run: RunData) -> list[Say]:
    """One sentence on the slow updates, by cause; none without one."""
    told = {event["update"]: event for event in run.events if event["kind"] == "slow"}
    there = [event for update, event in sorted(told.items()) if _stands(run, event)]
    if not there:
        return []
    worst = max(there, key=_factor)
    message = f"{worst['message'][:1].upper()}{worst['message'][1:]}."
    if len(there) > 1:
        causes = Counter(str(event["details"].get("cause", "unknown")) for event in there)
        counts = ", ".join(f"{count} x {name}" for name, count in causes.most_common())
        message += f" {times(len(there), 'update was', 'updates were')} slow ({counts})."
    return [Say("look", "look", message, worst["update"])]


def machine_facts(run: RunData) -> dict[str, float | None]:
    """A run's machine in a few numbers; None for unknown.

    Medians over updates and ranks; counts of updates.
    """
    slow = sum(record["slow"] is not None for record in run.machine)
    throttled = sum(
        any(one not in (None, "", "power cap") for one in record["rank_throttle"] or ())
        for record in run.machine
    )
    facts = {name: _median(run, field) for name, field in SHOWN.items()}
    return {
        "card's clock, MHz": facts["clock"],
        "card's power, W": facts["power"],
        "card's heat, C": facts["heat"],
        "card busy, share": facts["busy"],
        "throttled updates": float(throttled) if facts["clock"] is not None else None,
        "slow updates": float(slow) if run.machine else None,
    }


def last_reading(record: Record | None) -> str:
    """The newest reading of the hottest card in words; may be empty."""
    if record is None or not record["rank_temperature_c"]:
        return ""
    known = [(heat, rank) for rank, heat in enumerate(record["rank_temperature_c"]) if heat]
    if not known:
        return ""
    heat, rank = max(known)
    parts = [f"{heat:.0f} C"]
    for name, unit in (("rank_power_w", "W"), ("rank_sm_clock_mhz", "MHz")):
        value = _of(record, name, rank)
        parts += [] if value is None else [f"{value:,.0f} {unit}"]
    throttle = (record["rank_throttle"] or {rank: None})[rank]
    return f"card of rank {rank} {', '.join(parts)}{f', {throttle}' if throttle else ''}"


def _stands(run: RunData, event: Record) -> bool:
    return any(
        one["update"] == event["update"] and one["attempt"] == event["attempt"]
        for one in run.updates
    )


def _factor(event: Record) -> float:
    """Time taken over time expected; 0 for odd details."""
    took, expected = (event["details"].get(name) for name in ("took_s", "expected_s"))
    sound = isinstance(took, int | float) and isinstance(expected, int | float) and expected > 0
    return took / expected if sound else 0.0


def _median(run: RunData, field: str) -> float | None:
    known = [
        value
        for record in run.machine
        for value in record[field] or ()
        if isinstance(value, int | float)
    ]
    return statistics.median(known) if known else None


def _of(record: Record | None, field: str, rank: int) -> float | None:
    values = None if record is None else record[field]
    return values[rank] if values is not None and rank < len(values) else None
