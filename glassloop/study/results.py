"""Results of a study's cells, by cell and by setting.

They are read from the runs' folders.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glassloop.record.reading import RunData
from glassloop.report.payload import memory
from glassloop.study.cell_state import CellState, attempts, run_folder, state_of
from glassloop.study.quantities import QUANTITIES, measured
from glassloop.study.spec import Cell

# Of env.json: no part of where it ran.
OF_ONE_RUN = frozenset({"schema", "started", "command", "launcher_pid", "tracker_ids"})


@dataclass(frozen=True)
class CellResult:
    """A cell and its result.

    run: None without a result; `why` says so.
    """

    cell: Cell
    kind: str  # "done" | "diverged" | "partial" | "absent" | "other"
    why: str
    values: Mapping[str, float | None]  # by quantity; empty without a result
    phases: Mapping[str, tuple[float | None, float]]  # memory by phase: predicted and measured GiB
    beside: int | None  # cells that ran beside each other, itself included; None: not on record
    run: RunData | None

    @property
    def heldout_curve(self) -> list[tuple[int, float]]:
        return (
            []
            if self.run is None
            else [(one["update"], float(one["loss_nats"])) for one in self.run.evaluations]
        )


@dataclass(frozen=True)
class Spread:
    """A quantity of one setting over its seeds; finite values alone."""

    by_seed: Mapping[int, float]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.by_seed.values()) if self.by_seed else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds; None with fewer than two."""
        return statistics.stdev(self.by_seed.values()) if len(self.by_seed) > 1 else None


@dataclass(frozen=True)
class Group:
    """All seeds of one setting."""

    name: str
    settings: Mapping[str, str]
    results: tuple[CellResult, ...]

    def spread(self, quantity: str) -> Spread:
        values = {result.cell.seed: result.values.get(quantity) for result in self.results}
        return Spread(
            {
                seed: value
                for seed, value in values.items()
                if value is not None and math.isfinite(value)
            }
        )

    @property
    def finished(self) -> int:
        return sum(result.kind in ("done", "diverged") for result in self.results)


def read_results(cells: Sequence[Cell], out: Path) -> list[CellResult]:
    """One result a cell, in the cells' order."""
    last = {line["cell"]: line for line in attempts(out)}  # the newest of each cell
    found = []
    for cell in cells:
        state = state_of(cell, out)
        run = state.run if state.finished else None
        phases = (memory(run.events) or {}).get("phases", {}) if run is not None else {}
        found.append(
            CellResult(
                cell,
                state.kind,
                state.why if state.finished else _why_none(state, last.get(cell.name)),
                {} if run is None else measured(run),
                {name: (pair[0], pair[1]) for name, pair in phases.items()},
                last.get(cell.name, {}).get("beside"),
                run,
            )
        )
    return found


def _why_none(state: CellState, attempt: Mapping[str, Any] | None) -> str:
    """Say why a cell has no result."""
    folder = state.why or ("not run yet" if attempt is None else "no run's folder")
    said = " ".join(str(attempt["said"]).split())[-300:] if attempt and attempt["said"] else ""
    return (
        folder
        if attempt is None
        else f"{folder}; ended with exit code {attempt['exit_code']}: {said}"
    )


def groups_of(results: Sequence[CellResult]) -> list[Group]:
    """Cells that differ in nothing but their seed, in the grid's order."""
    names = dict.fromkeys(result.cell.group for result in results)
    return [
        Group(name, of_group[0].cell.settings, tuple(of_group))
        for name in names
        if (of_group := [result for result in results if result.cell.group == name])
    ]


def environments_of(results: Sequence[CellResult]) -> list[dict[str, Any]]:
    """List where the cells ran, each place once.

    A place has versions, commit and GPUs as env.json has them, and its count of cells.
    """
    places: dict[str, dict[str, Any]] = {}
    for result in results:
        if result.run is not None and result.run.env:
            place = {
                name: value for name, value in result.run.env.items() if name not in OF_ONE_RUN
            }
            places.setdefault(json.dumps(place, sort_keys=True), place | {"cells": 0})["cells"] += 1
    return list(places.values())


def as_plain(results: Sequence[CellResult], groups: Sequence[Group], out: Path) -> dict[str, Any]:
    """Return plain JSON of places, cells and settings.

    A number that is not finite is text.
    """
    return {
        "environments": environments_of(results),
        "quantities": {
            name: {"unit": one.unit, "words": one.words} for name, one in QUANTITIES.items()
        },
        "cells": [
            {
                "cell": result.cell.name,
                "settings": dict(result.cell.settings),
                "seed": result.cell.seed,
                "state": result.kind,
                "why": result.why,
                "beside": result.beside,
                "values": {name: plain(value) for name, value in result.values.items()},
                "memory_gib": {
                    phase: {"predicted": pair[0], "measured": pair[1]}
                    for phase, pair in result.phases.items()
                },
                "run": str(run_folder(result.cell, out)),
            }
            for result in results
        ],
        "settings": [
            {
                "name": group.name,
                "settings": dict(group.settings),
                "seeds": group.finished,
                "values": {
                    name: {
                        "mean": spread.mean,
                        "deviation": spread.deviation,
                        "seeds": len(spread.by_seed),
                    }
                    for name in QUANTITIES
                    if (spread := group.spread(name)).by_seed
                },
            }
            for group in groups
        ],
    }


def plain(value: float | None) -> float | str | None:
    """A number as JSON can hold it."""
    return value if value is None or math.isfinite(value) else str(value)
