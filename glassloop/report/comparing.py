"""Compare runs: settings, first difference, verdict against the seeds' spread.

Runs that differ in nothing but their seed make a side. A verdict compares the means of two sides by
Welch's interval (B. L. Welch, Biometrika 34, 1947) and needs two seeds on each.
"""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from glassloop.disk.secrets import without_secrets
from glassloop.record.reading import RunData, flat, number, setting
from glassloop.report.partings import Parting, first_partings, relative_difference
from glassloop.report.verdict import Side, verdict_of

# Relative difference that the order of additions makes in a recorded number, without repeats.
FLOORS = {"fp32": 1e-5}
OTHER_FLOOR = 2e-3  # bf16 and fp16 on a GPU: kernels add in any order
REPEATS = 4.0  # times the largest difference of two repeats; as in glassloop replay
REPEATS_PART = 0.05  # a relative difference of repeats from here on is no noise
# Fields that change no update.
NO_MATTER = ("run.", "resume.", "tracking.", "record.", "checkpoint.", "model.cache_dir", "preset")
OF_THE_RUN = ("run.name", "run.dir", "resume.run")  # fields that tell runs apart and nothing else


@dataclass(frozen=True)
class ComparedRuns:
    """A side against the first."""

    a: RunData
    b: RunData
    same_seed: bool
    compared: int  # updates that both have
    went_in: Parting | None  # first difference of what an update was given: rows, tokens, lr
    # First difference of what it made of them: loss, norm, clipping, reaction.
    came_out: Parting | None
    verdict: str  # "A is lower" | "B is lower" | "not resolved" | "the same"
    why: str


@dataclass(frozen=True)
class Comparison:
    """What `glassloop compare` shows."""

    sides: tuple[Side, ...]
    # Field and its value in each run, in the order of the sides.
    differences: tuple[tuple[str, tuple[Any, ...]], ...]
    measure: str  # what verdicts rest on, in words
    scores: tuple[tuple[float | None, ...], ...]  # by side, then run
    floor: float
    floor_from: str
    pairs: tuple[ComparedRuns, ...]

    @property
    def runs(self) -> tuple[RunData, ...]:
        return tuple(run for side in self.sides for run in side.runs)


def compare(runs: Sequence[RunData], floor: float | None = None) -> Comparison:
    """Raises ValueError for fewer than two runs, or one without an update."""
    if len(runs) < 2:
        raise ValueError(f"glassloop compare needs at least two runs, and got {len(runs)}")
    for run in runs:
        if not run.updates:
            raise ValueError(
                f"{run.folder} has no update on record yet, so there is nothing to compare"
            )
    sides = sides_of(runs)
    ordered = [run for side in sides for run in side.runs]
    measure, scores = measured(sides)
    if floor is not None:
        used, source = floor, "as asked (--floor)"
    else:
        used, source = floor_of(sides)
    if len(sides) == 1:
        pairs = tuple(_same_side(sides[0].runs[0], other, used) for other in sides[0].runs[1:])
    else:
        pairs = tuple(
            _pair(sides[0], side, used, scores[0], scores[i]) for i, side in enumerate(sides) if i
        )
    return Comparison(
        tuple(sides), tuple(differences(ordered)), measure, scores, used, source, pairs
    )


def sides_of(runs: Sequence[RunData]) -> list[Side]:
    """Group runs by what was asked of which code."""
    groups: dict[str, list[RunData]] = {}
    for run in runs:
        groups.setdefault(repr(sorted(_asked(run).items(), key=lambda pair: pair[0])), []).append(
            run
        )
    names = [chr(65 + i) if i < 26 else f"side {i + 1}" for i in range(len(groups))]
    return [Side(name, tuple(group)) for name, group in zip(names, groups.values(), strict=True)]


def differences(runs: Sequence[RunData]) -> list[tuple[str, tuple[Any, ...]]]:
    """List fields of config, plan and environment that differ.

    None stands for a field that a run does not have. Secrets are hidden.
    """
    found = []
    tables = [_everything(run) for run in runs]
    for name in dict.fromkeys(name for table in tables for name in table):
        values = tuple(table.get(name) for table in tables)
        if name not in OF_THE_RUN and any(value != values[0] for value in values):
            last = name.rpartition(".")[2]
            shown = tuple(without_secrets({last: value})[last] for value in values)
            found.append((name, shown))
    return found


def measured(sides: Sequence[Side]) -> tuple[str, tuple[tuple[float | None, ...], ...]]:
    """Return what the verdict rests on, and each run's value.

    Lower is better.
    """
    runs = [run for side in sides for run in side.runs]
    common = set.intersection(*({one["update"] for one in run.evaluations} for run in runs))
    if common and max(common) > 0:
        update = max(common)
        values = {
            id(run): number(
                next(one["loss_nats"] for one in run.evaluations if one["update"] == update)
            )
            for run in runs
        }
        words = f"held-out loss after update {update}, nats a token"
    else:
        last = min(run.updates[-1]["update"] for run in runs)
        first = last - max(3, last // 5) + 1
        values = {id(run): _mean_loss(run, first, last) for run in runs}
        words = f"mean training loss of updates {max(first, 1)} to {last}, nats a token"
    return words, tuple(tuple(values[id(run)] for run in side.runs) for side in sides)


def floor_of(sides: Sequence[Side]) -> tuple[float, str]:
    """Return the relative noise floor and its source.

    Repeats (same side, same seed) measure it if there are any.
    """
    repeats = []
    # Of one side alone, whether they differ is what is asked.
    for side in sides if len(sides) > 1 else ():
        for i, a in enumerate(side.runs):
            for b in side.runs[i + 1 :]:
                if setting(a.config, "seed") == setting(b.config, "seed"):
                    repeats.append((a, b, _largest_difference(a, b)))
    measured_by = [(off, a, b) for a, b, off in repeats if off is not None]
    precisions = {
        setting(run.config, "execution.precision", "bf16") for side in sides for run in side.runs
    }
    assumed = max(FLOORS.get(precision, OTHER_FLOOR) for precision in precisions)
    if measured_by:
        off, a, b = max(measured_by, key=lambda one: one[0])
        if off > REPEATS_PART:
            return (
                assumed,
                f"assumed: the repeats {a.name} and {b.name} part by {off:.0%}, which is no noise "
                f"(glassloop compare {shlex.join((str(a.folder), str(b.folder)))})",
            )
        return max(
            REPEATS * off, 1e-9
        ), f"{REPEATS:g} times the largest difference of the repeats {a.name} and {b.name}"
    return (
        assumed,
        f"assumed for {', '.join(sorted(map(str, precisions)))}; two runs of one seed on a side "
        "would measure it",
    )


def _pair(
    first: Side,
    other: Side,
    floor: float,
    scores_a: Sequence[float | None],
    scores_b: Sequence[float | None],
) -> ComparedRuns:
    a, b, same_seed = _partners(first, other)
    compared, went_in, came_out = first_partings(a, b, floor)
    verdict, why = verdict_of(first, other, scores_a, scores_b, went_in or came_out, compared)
    return ComparedRuns(a, b, same_seed, compared, went_in, came_out, verdict, why)


def _same_side(a: RunData, b: RunData, floor: float) -> ComparedRuns:
    """Compare two runs of one side."""
    same_seed = setting(a.config, "seed") == setting(b.config, "seed")
    compared, went_in, came_out = first_partings(a, b, floor)
    if went_in is None and came_out is None:
        return ComparedRuns(
            a,
            b,
            same_seed,
            compared,
            None,
            None,
            "the same",
            f"no recorded number of {compared:,} updates differs beyond the noise floor",
        )
    if same_seed:
        why = (
            "the same config, seed, versions and code, and still they part: something else changed "
            "(data, a fault, hardware)"
        )
        return ComparedRuns(a, b, same_seed, compared, went_in, came_out, "not resolved", why)
    return ComparedRuns(
        a,
        b,
        same_seed,
        compared,
        went_in,
        came_out,
        "not resolved",
        "nothing but the seed was asked differently: the difference is the spread of seeds",
    )


def _partners(first: Side, other: Side) -> tuple[RunData, RunData, bool]:
    """Choose two runs of one seed, else the first ones."""
    for a in first.runs:
        for b in other.runs:
            if setting(a.config, "seed") == setting(b.config, "seed"):
                return a, b, True
    return first.runs[0], other.runs[0], False


def _asked(run: RunData) -> dict[str, Any]:
    """Return what tells sides apart: settings, versions, code, hardware."""
    everything = _everything(run)
    return {
        name: value
        for name, value in everything.items()
        if name != "seed" and not name.startswith(NO_MATTER)
    }


def _everything(run: RunData) -> dict[str, Any]:
    env = flat(run.env)
    kept = {
        name: env[name]
        for name in env
        if name.startswith("packages.") or name in ("git.commit", "cuda", "driver", "python")
    }
    gpus = (run.env or {}).get("gpus")
    hardware = (
        {"gpus": [gpu.get("name") if isinstance(gpu, dict) else gpu for gpu in gpus]}
        if gpus
        else {}
    )
    return flat(run.config) | {"ranks": run.ranks} | kept | hardware


def _largest_difference(a: RunData, b: RunData) -> float | None:
    """Return the largest relative difference of two repeats.

    It is of loss and norm; None if they did not see the same rows.
    """
    of_b = {record["update"]: record for record in b.updates}
    offs = []
    for one in a.updates:
        two = of_b.get(one["update"])
        if two is None or one["supervised_tokens"] != two["supervised_tokens"]:
            continue
        for name in ("loss_nats", "grad_norm_pre_clip"):
            off = relative_difference(number(one[name]), number(two[name]))
            if off is not None and math.isfinite(off):
                offs.append(off)
    return max(offs, default=None)


def _mean_loss(run: RunData, first: int, last: int) -> float | None:
    losses = [
        number(record["loss_nats"])
        for record in run.updates
        if first <= record["update"] <= last and record["action"] == "applied"
    ]
    finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    return statistics.fmean(finite) if finite else None
