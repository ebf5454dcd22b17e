"""Cells that diverged: which update to replay. No torch."""

from __future__ import annotations

import math
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glassloop.disk.opening import read_plain, require_plain_folder
from glassloop.disk.publish import write_text
from glassloop.record.reading import RunData, number
from glassloop.study.quantities import SPIKES, first_bad
from glassloop.study.results import CellResult

BISECT_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Divergence:
    """A cell whose training broke, and the update to replay."""

    cell: str
    update: int
    why: str
    command: str
    answer: str | None  # of the bisection; None if none was asked for or it is not there


def divergences(results: Sequence[CellResult], out: Path) -> list[Divergence]:
    """In the cells' order."""
    found = []
    for result in results:
        if result.run is not None and result.values.get("diverged"):
            update, why = where_to_look(result.run)
            answer = _file(out, result.cell.name)
            text = _answer(answer)
            folder = shlex.quote(str(result.run.folder))
            command = f"glassloop replay {folder} --update {update} --bisect --try"
            found.append(Divergence(result.cell.name, update, why, command, text))
    return found


def where_to_look(run: RunData) -> tuple[int, str]:
    """Find the update at which divergence began.

    It is the earliest one with an alarm for a spike, after which the loss stood far above its
    start, or that is not finite.

    Without any of them the one with the largest gradient norm.
    """
    found = [
        (
            max(1, int(event["details"]["since"]) - 1),
            "the step after which the loss stood far above its start",
        )
        for event in _told_to_diverge(run)
    ]
    found += [
        (int(one["update"]), f"the first alarm ({', '.join(one['alarms'])})")
        for one in run.updates
        if SPIKES & set(one.get("alarms") or ())
    ]
    if (bad := first_bad(run)) is not None:
        found.append((bad, "the first update that is not finite"))
    if found:
        return min(found, key=lambda one: one[0])
    norms = [
        (norm, one["update"])
        for one in run.updates
        if (norm := number(one["grad_norm_pre_clip"])) is not None and math.isfinite(norm)
    ]
    return (
        (int(max(norms)[1]), "the largest gradient norm; no alarm was raised")
        if norms
        else (1, "no norm is on record")
    )


def _told_to_diverge(run: RunData) -> list[dict[str, Any]]:
    """Alarms of the detector `diverged`."""
    return [
        event
        for event in run.events
        if event["kind"] == "alarm" and isinstance(event["details"].get("since"), int)
    ]


def bisect(
    one: Divergence, out: Path, environment: dict[str, str], timeout_s: float = BISECT_TIMEOUT_S
) -> str:
    """Run the command of a divergence, and keep its answer.

    An answer that is there already is not asked for again.
    """
    path = _file(out, one.cell)
    if (kept := _answer(path)) is not None:
        return kept
    words = [sys.executable, "-m", "glassloop.cli", *shlex.split(one.command)[1:]]
    try:
        done = subprocess.run(
            words,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return f"no answer after {timeout_s:g} s: {one.command}"
    if done.returncode not in (0, 1):  # 1: the update does not reproduce, which is an answer too
        return f"exit code {done.returncode}: {done.stderr.strip()[-400:]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, done.stdout)
    return done.stdout


def _answer(path: Path) -> str | None:
    """What a bisection printed; None if none is kept."""
    require_plain_folder(path.parent)
    try:
        return read_plain(path).decode("utf-8", "replace")
    except FileNotFoundError:
        return None


def _file(out: Path, cell: str) -> Path:
    return out / "bisections" / f"{cell}.txt"
