"""Read from disk what a study's cells have done. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glassloop.config import as_dict
from glassloop.disk.opening import require_plain_folder
from glassloop.record.checked import is_finite
from glassloop.record.jsonl import read_jsonl
from glassloop.record.reading import RunData, flat, read_run
from glassloop.study.quantities import first_bad
from glassloop.study.spec import Cell

ATTEMPTS = "attempts.jsonl"  # one line a process that was started
NO_MATTER = ("run.", "resume.", "model.cache_dir", "preset")  # fields that say where things lie
ATTEMPT_FIELDS = ("cell", "exit_code", "seconds", "beside", "said")


@dataclass(frozen=True)
class CellState:
    """The state of a cell's folder.

    kind: "absent" | "done" | "diverged" | "partial" | "other". why: in words. run: if there is one.
    """

    kind: str
    why: str = ""
    run: RunData | None = None

    @property
    def finished(self) -> bool:
        return self.kind in ("done", "diverged")


def state_of(cell: Cell, out: Path) -> CellState:
    """Read a cell's state from disk.

    Raises ValueError if a file of the run is damaged.
    """
    folder = run_folder(cell, out)
    require_plain_folder(folder.parent)
    require_plain_folder(folder)
    if not os.path.lexists(folder / "config.yaml"):
        return CellState("absent")
    run = read_run(folder)
    ours, theirs = _asked(as_dict(cell.config)), _asked(run.config or {})
    if ours["execution.engine"] == "auto":  # a run's folder has the engine that was chosen
        ours["execution.engine"] = theirs.get("execution.engine")
    differing = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if differing:
        name = differing[0]
        return CellState(
            "other", f"{name} = {theirs.get(name)}, and {ours.get(name)} is asked now", run
        )
    end = run.end["kind"] if run.end else None
    if (
        end == "finished"
        and run.updates
        and (run.ended_early or run.updates[-1]["update"] == run.planned_updates)
    ):
        return CellState("done", run=run)
    if end == "failed" and (bad := first_bad(run)) is not None:
        return CellState("diverged", f"update {bad} was not finite, or not applied", run)
    message = f": {run.end['message']}" if run.end else ""
    return CellState(
        "partial", f"{len(run.updates)} of {run.planned_updates} updates{message}", run
    )


def run_folder(cell: Cell, out: Path) -> Path:
    return out / "cells" / cell.name


def attempts(out: Path) -> list[dict[str, Any]]:
    """What was started so far: cell, exit_code, seconds, beside, device, said."""
    path = out / ATTEMPTS
    lines = read_jsonl(path) if os.path.lexists(path) else []
    for line in lines:
        missing = [name for name in ATTEMPT_FIELDS if name not in line]
        if missing or not isinstance(line["cell"], str) or not is_finite(line["seconds"]):
            raise ValueError(
                f"{path}: cell = {line.get('cell')!r:.80}, seconds = {line.get('seconds')!r:.80}"
                f"{f', {missing[0]} is missing' if missing else ''}; the file was damaged or "
                "edited. Remove the line"
            )
    return lines


def _asked(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flat(config).items() if not name.startswith(NO_MATTER)}
