"""Build a study's HTML page, which loads nothing.

Styles, scripts and policy are those of a run's report.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import glassloop
from glassloop.record.reading import RunData, number
from glassloop.report.columns import column
from glassloop.report.page import ASSETS, SHARED, whole_page
from glassloop.study.answers import Answers
from glassloop.study.answers_text import columns_of
from glassloop.study.critical import lines
from glassloop.study.quantities import QUANTITIES
from glassloop.study.results import Group, environments_of, plain
from glassloop.study.verdicts import as_plain

OWN = Path(__file__).parent / "assets"
CURVES = {
    "loss": "loss_nats",
    "norm": "grad_norm_pre_clip",
    "noise": "noise_scale_tokens",
    "lr": "lr",
}


def payload(answers: Answers) -> dict[str, Any]:
    """The page's data. It holds no text of a row."""
    study, groups = answers.study, answers.groups
    return {
        "kind": "study",
        "title": study.name,
        "question": study.question,
        "cannot_say": study.cannot_say,
        "file": study.file,
        "words": list(study.words),
        "equal": study.equal,
        "seeds": list(study.seeds),
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "glassloop": glassloop.__version__,
        "places": [place_line(one) for one in environments_of(answers.results)],
        "quantities": {
            name: {
                "measure": QUANTITIES[name].measure,
                "unit": QUANTITIES[name].unit,
                "words": QUANTITIES[name].words,
            }
            for name in columns_of(study, groups)
        },
        "groups": [
            {
                "name": group.name,
                "finished": group.finished,
                "values": {name: _values(group, name) for name in columns_of(study, groups)},
                "curves": _curves(group),
                "heldout": _mean_points(
                    [result.heldout_curve for result in group.results if result.run is not None]
                ),
            }
            for group in groups
        ],
        "claims": [as_plain(one) for one in answers.judged],
        "critical": [lines(one) for one in answers.critical],
        "memory": [
            [group.name, phase, predicted, measured]
            for group in groups
            if (first := next((one for one in group.results if one.phases), None)) is not None
            for phase, (predicted, measured) in first.phases.items()
        ],
        "diverged": [vars(one) for one in answers.diverged],
        "missing": [
            [one.cell.name, one.why]
            for one in answers.results
            if one.kind not in ("done", "diverged")
        ],
        "beside": max((one.beside or 0 for one in answers.results), default=0),
    }


def place_line(place: Mapping[str, Any]) -> str:
    """One of results.environments_of in a line: card, torch, commit."""
    gpus = [gpu["name"] for gpu in place.get("gpus") or []]
    commit, torch = (
        (place.get("git") or {}).get("commit"),
        (place.get("packages") or {}).get("torch"),
    )
    parts = [
        ", ".join(gpus) or "CPU",
        f"torch {torch}",
        f"commit {commit[:10]}" if commit else "no commit",
    ]
    return f"{place['cells']} cells on {'; '.join(parts)}"


def page(data: dict[str, Any]) -> str:
    """The whole file."""
    return whole_page(
        data, OWN / "study.html", [*(ASSETS / name for name in SHARED), OWN / "study.js"]
    )


def _values(group: Group, name: str) -> dict[str, Any]:
    spread = group.spread(name)
    raw = {str(result.cell.seed): plain(result.values.get(name)) for result in group.results}
    return {"mean": spread.mean, "deviation": spread.deviation, "by_seed": raw}


def _curves(group: Group) -> dict[str, Any]:
    """Return means over the seeds, update by update.

    A mean is infinite if one of its values is not finite.
    """
    runs = [result.run for result in group.results if result.run is not None]
    updates = sorted({one["update"] for run in runs for one in run.updates})
    return {
        "update": updates,
        **{name: column(_mean_curve(runs, field, updates)) for name, field in CURVES.items()},
    }


def _mean_curve(runs: Sequence[RunData], field: str, updates: Sequence[int]) -> list[float | None]:
    tables = [{one["update"]: number(one.get(field)) for one in run.updates} for run in runs]
    found: list[float | None] = []
    for update in updates:
        values = [value for table in tables if (value := table.get(update)) is not None]
        found.append(
            statistics.fmean(values)
            if values and all(map(math.isfinite, values))
            else math.inf
            if values
            else None
        )
    return found


def _mean_points(curves: Sequence[Sequence[tuple[int, float]]]) -> list[list[float]]:
    """[update, mean] where every seed has a finite value."""
    tables = [dict(curve) for curve in curves]
    common = set.intersection(*map(set, tables)) if tables else set()
    return [
        [update, statistics.fmean(table[update] for table in tables)]
        for update in sorted(common)
        if all(math.isfinite(table[update]) for table in tables)
    ]
