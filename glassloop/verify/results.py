"""The verdict on members (distance from the formula) and mutants (noticed).

The table and the JSON of `glassloop verify`.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import safetensors.numpy

MARKS = {  # largest L2 distance relative to the formula's, in fp32
    "gradient": 1e-6,  # g of update 1, at equal weights
    "sgd": 2e-6,  # change of the adapters over all updates
    # the same; 8-bit states round what is left of a difference up to one of their levels
    "adamw_8bit": 1e-3,
}
WIDTH = 100  # columns of the table


@dataclass(frozen=True)
class Verdict:
    """Verdict on one member or mutant.

    Attributes:
        kind: "member" | "mutant".
        fault: of a mutant, in words.
        distances: by what was compared; missing where it ended before.
        stopped_by: what the loop's own guard said when it ended the updates; None if it did not.
        left_out: why an engine took no part; then nothing was compared.
        good: a member is within every mark and was not stopped; a mutant trained, and is beyond a
            mark or was stopped.
    """

    kind: str
    name: str
    fault: str | None
    distances: dict[str, float]
    stopped_by: str | None
    left_out: str | None
    good: bool

    @property
    def worst(self) -> str | None:
        """The distance nearest to its mark, or farthest beyond it."""

        def badness(what: str) -> float:
            share = self.distances[what] / MARKS[what]
            return math.inf if math.isnan(share) else share

        return max(self.distances, key=badness, default=None)


def judge(folder: Path) -> tuple[list[Verdict], dict[str, list[float | None]], dict[str, Any]]:
    """Read what the workers left in `folder`.

    Returns verdicts in the table's order, the fingerprint (series of losses and norms by task,
    optimizer and quantity), and the environment that the workers ran in.
    """
    read = [json.loads(path.read_text()) for path in sorted(folder.glob("results_*.json"))]
    jobs = [facts for one in read for facts in one["jobs"]]
    tasks = [facts["task"] for facts in jobs if facts["kind"] == "formula"]
    chosen = [facts for facts in jobs if facts["kind"] != "formula"]
    chosen.sort(
        key=lambda facts: (
            facts["kind"] == "mutant",
            facts["kind"] == "member" and tasks.index(facts["task"]),
        )
    )
    fingerprint = {
        f"{facts['task']} {name}": series
        for facts in jobs
        if facts["fingerprint"]
        for name, series in facts["series"].items()
    }
    return [_verdict(facts, folder) for facts in chosen], fingerprint, read[0]["environment"]


def _verdict(facts: dict[str, Any], folder: Path) -> Verdict:
    """Compare what a job left with what the formula left."""
    kind, stopped, left_out = facts["kind"], facts["stopped_by"], facts["left_out"]
    mine, formula = (
        safetensors.numpy.load_file(folder / f"{name}.safetensors")
        for name in (facts["name"], f"{facts['task']} formula")
    )
    distances = {
        what: distance(mine[what], formula[what])
        for what in MARKS
        if what in mine and what in formula
    }
    whole = kind == "mutant" or set(distances) == set(MARKS)
    agrees = (
        stopped is None and whole and all(value <= MARKS[what] for what, value in distances.items())
    )
    # A mutant that an error kept from training has shown nothing.
    good = left_out is not None or (agrees if kind == "member" else facts["began"] and not agrees)
    return Verdict(kind, facts["name"], facts["fault"], distances, stopped, left_out, good)


def distance(mine: numpy.ndarray, reference: numpy.ndarray) -> float:
    """L2 distance relative to the reference; NaN if one is not finite."""
    difference = mine.astype(numpy.float64) - reference.astype(numpy.float64)
    return float(numpy.linalg.norm(difference) / numpy.linalg.norm(reference.astype(numpy.float64)))


def table(verdicts: list[Verdict]) -> list[str]:
    """Write a line for each member and mutant, at most WIDTH columns.

    A second line says where the loop or an error stopped it.
    """
    width = max((len(v.name) for v in verdicts), default=0)
    lines: list[str] = []
    for kind in ("member", "mutant"):
        chosen = [v for v in verdicts if v.kind == kind]
        if chosen:
            lines += [
                *([""] if lines else []),
                f"{kind:<{width}}  compared    difference   mark  verdict",
            ]
        for v in chosen:
            lines.append(f"{v.name:<{width}}  {_compared(v)}  {_word(v)}")
            if v.left_out is not None:
                lines.append(_cut(f"  {v.left_out}"))
            if v.stopped_by is not None:
                lines.append(_cut(f"  stopped: {v.stopped_by}"))
    return lines


def _compared(v: Verdict) -> str:
    """Write the comparison, its worst difference and its mark.

    "guard" if the loop stopped it and no number shows the fault.
    """
    worst = v.worst
    if worst is None or (v.stopped_by is not None and v.distances[worst] <= MARKS[worst]):
        what = "" if v.stopped_by is None else "guard"
        return f"{what:<10}  {'-':>10}  {'-':>5}"
    return f"{worst:<10}  {v.distances[worst]:10.1e}  {MARKS[worst]:.0e}"


def _word(v: Verdict) -> str:
    if v.left_out is not None:
        return "left out"
    words = {
        ("member", True): "ok",
        ("member", False): "DIFFERS",
        ("mutant", True): "caught",
        ("mutant", False): "MISSED",
    }
    return words[v.kind, v.good]


def _cut(text: str) -> str:
    """One line of at most WIDTH columns; the margin stays."""
    flat = text[: len(text) - len(text.lstrip())] + " ".join(text.split())
    return flat if len(flat) <= WIDTH else flat[: WIDTH - 1] + "…"


def summary(verdicts: list[Verdict], seconds: float) -> str:
    """One line."""
    members = [v for v in verdicts if v.kind == "member" and v.left_out is None]
    mutants = [v for v in verdicts if v.kind == "mutant"]
    absent = sum(v.left_out is not None for v in verdicts)
    return (
        f"{sum(v.good for v in members)} of {len(members)} members agree with the formula, "
        f"{sum(v.good for v in mutants)} of {len(mutants)} mutants are caught"
        + (f", {absent} left out" if absent else "")
        + f"; {seconds:.0f} s"
    )


def as_plain(verdict: Verdict) -> dict[str, Any]:
    """A verdict as plain JSON values."""
    return asdict(verdict) | {"worst": verdict.worst}


def to_json(value: Any) -> str:
    """Plain JSON values: floats whole, not finite as "nan", "inf", "-inf"."""
    return json.dumps(_finite(value), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
