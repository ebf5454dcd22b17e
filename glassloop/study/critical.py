"""Critical accumulation: predicted by noise scales, shown by a sweep.

An update of N supervised tokens has E|g|^2 = |G|^2 + tr(Sigma) / N (noise.py), and the loss that it
can take off goes with 1 / (1 + B / N), where B = tr(Sigma) / |G|^2 is the noise scale (McCandlish
et al. 2018, arXiv:1812.06162, equations 2.5 to 2.8). So a sweep knows B in two ways of its own:

    by norms    |g|^2 of each accumulation is a line in 1/N:              B = slope / intercept
    by loss     with equal updates, 1 / (fall of held-out loss) is too:   B = slope / intercept

and a third of another kind where cells saw equal rows: the largest accumulation whose held-out loss
is not shown to be worse than the best one's. The critical accumulation is B over the supervised
tokens of a micro-batch on all ranks. The equations are for plain gradient descent at its best step
size; Adam at one learning rate for all cells is another optimizer, so agreement within a factor of
2 is all that is asked.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glassloop.record.reading import RunData, number
from glassloop.study.results import CellResult, Group
from glassloop.study.verdicts import CONTRADICTED, SUPPORTED, UNRESOLVED, interval

AXIS = "batch.accumulation"
FACTOR = 2.0


@dataclass(frozen=True)
class Compared:
    """A prediction beside what the sweep shows.

    Both are in supervised tokens, by seed.
    """

    by: str
    predicted: Mapping[int, float]
    shown: Mapping[int, float]
    verdict: str
    why: str


@dataclass(frozen=True)
class Critical:
    """Of one setting of the other axes.

    Attributes:
        micro_tokens: supervised tokens of one micro-batch on all ranks, mean of the runs.
        predicted_by_cell: accumulation -> noise scale in tokens, mean over seeds; an accumulation
            without parts to compare has none.
        equal_rows: in words, where cells saw equal rows; None otherwise.
    """

    setting: str
    micro_tokens: float
    predicted_by_cell: Mapping[int, float]
    compared: tuple[Compared, ...]
    equal_rows: str | None


def critical_of(groups: Sequence[Group], equal: str | None) -> list[Critical]:
    """One for each setting of the other axes that has a result."""
    others: dict[str, list[Group]] = {}
    for group in groups:
        rest = ", ".join(
            f"{axis} = {label}" for axis, label in group.settings.items() if axis != AXIS
        )
        others.setdefault(rest, []).append(group)
    return [
        found
        for rest, of_rest in others.items()
        if (found := _of_setting(rest, of_rest, equal)) is not None
    ]


def line_ratio(points: Sequence[tuple[float, float]]) -> float | None:
    """Return slope / intercept of a line through points (1/N, y).

    It is a least squares line. None for fewer than three points, or unless both are above 0.
    """
    if len({x for x, _ in points}) < 3:
        return None
    mean_x, mean_y = statistics.fmean(x for x, _ in points), statistics.fmean(y for _, y in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum(
        (x - mean_x) ** 2 for x, _ in points
    )
    intercept = mean_y - slope * mean_x
    return slope / intercept if slope > 0 and intercept > 0 else None


def agreement(predicted: Mapping[int, float], shown: Mapping[int, float]) -> tuple[str, str]:
    """Judge "within a factor of 2".

    It uses the paired interval of log(predicted / shown).
    """
    both = [seed for seed in predicted if seed in shown]
    if len(both) < 2:
        few = f"{len(both)} seed{'' if len(both) == 1 else 's'} with both numbers"
        return (
            UNRESOLVED,
            f"{few} (a line that does not rise, or whose intercept is not above 0, gives none)",
        )
    mean, half = interval([math.log(predicted[seed] / shown[seed]) for seed in both])
    low, high = math.exp(mean - half), math.exp(mean + half)
    words = (
        f"predicted / shown = {math.exp(mean):.3g}, 95 % interval {low:.3g} to {high:.3g}, "
        f"{len(both)} seeds"
    )
    if low >= 1 / FACTOR and high <= FACTOR:
        return SUPPORTED, words
    return (CONTRADICTED if high < 1 / FACTOR or low > FACTOR else UNRESOLVED), words


def as_plain(found: Critical) -> dict[str, Any]:
    """Plain JSON."""
    return {
        "setting": found.setting,
        "micro_tokens": found.micro_tokens,
        "predicted_tokens_by_accumulation": {
            str(key): value for key, value in found.predicted_by_cell.items()
        },
        "predicted_accumulation": {
            str(key): value / found.micro_tokens for key, value in found.predicted_by_cell.items()
        },
        "compared": [
            {
                "by": one.by,
                "predicted_tokens": {str(seed): value for seed, value in one.predicted.items()},
                "shown_tokens": {str(seed): value for seed, value in one.shown.items()},
                "predicted_accumulation": _mean(one.predicted, found.micro_tokens),
                "shown_accumulation": _mean(one.shown, found.micro_tokens),
                "verdict": one.verdict,
                "why": one.why,
            }
            for one in found.compared
        ],
        "equal_rows": found.equal_rows,
    }


def lines(found: Critical) -> list[str]:
    """For people."""
    said = [
        f"{found.setting or 'all cells'}: {found.micro_tokens:,.0f} supervised tokens a micro-batch"
    ]
    for accumulation, tokens in found.predicted_by_cell.items():
        said.append(
            f"predicted from the runs with accumulation {accumulation}: {tokens:,.0f} tokens = "
            f"accumulation {tokens / found.micro_tokens:.3g}"
        )
    for one in found.compared:
        shown = _mean(one.shown, found.micro_tokens)
        said.append(
            f"shown {one.by}: {'no number' if shown is None else f'accumulation {shown:.3g}'}; "
            f"within a factor of 2: {one.verdict}, {one.why}"
        )
    return said + ([f"shown by equal rows: {found.equal_rows}"] if found.equal_rows else [])


def _of_setting(setting: str, groups: Sequence[Group], equal: str | None) -> Critical | None:
    results = [result for group in groups for result in group.results if result.run is not None]
    if not results:
        return None
    micro = statistics.fmean(
        _tokens(result.run) / int(result.cell.settings[AXIS])
        for result in results
        if result.run is not None
    )
    if not micro:
        return None
    by_cell = {
        int(group.settings[AXIS]): spread.mean
        for group in groups
        if (spread := group.spread("noise_scale")).mean is not None
    }
    seeds = sorted({result.cell.seed for result in results})
    predicted, norms, losses = {}, {}, {}
    for seed in seeds:
        of_seed = [result for result in results if result.cell.seed == seed]
        known = [
            value
            for result in of_seed
            if (value := result.values.get("noise_scale")) is not None and value > 0
        ]
        if known:
            predicted[seed] = statistics.geometric_mean(known)
        if (
            by_norms := line_ratio(
                [point for result in of_seed if (point := _norm_point(result)) is not None]
            )
        ) is not None:
            norms[seed] = by_norms
        if (
            by_loss := line_ratio(
                [point for result in of_seed if (point := _loss_point(result)) is not None]
            )
        ) is not None:
            losses[seed] = by_loss
    compared = [Compared("by norms", predicted, norms, *agreement(predicted, norms))]
    if equal == "updates":
        compared.append(Compared("by loss", predicted, losses, *agreement(predicted, losses)))
    named = {key: value for key, value in by_cell.items() if value is not None}
    return Critical(
        setting,
        micro,
        named,
        tuple(compared),
        _equal_rows(groups) if equal == "rows_seen" else None,
    )


def _equal_rows(groups: Sequence[Group]) -> str:
    """Word the largest accumulation not shown to be worse.

    It is compared with the accumulation of the lowest mean held-out loss.
    """
    losses = {int(group.settings[AXIS]): group.spread("heldout_loss").by_seed for group in groups}
    means = {
        key: statistics.fmean(values.values()) for key, values in losses.items() if len(values) > 1
    }
    if len(means) < 2:
        return "not resolved: fewer than two accumulations have two seeds with a held-out loss"
    best = min(means, key=lambda key: means[key])
    alike = [best]
    for key in means:
        apart = [
            losses[key][seed] - losses[best][seed] for seed in losses[key] if seed in losses[best]
        ]
        if key != best and len(apart) > 1:
            mean, half = interval(apart)
            alike += [key] if mean - half <= 0 else []
    worse = sorted(key for key in means if key not in alike)
    more = (
        f"; shown to be worse: {', '.join(map(str, worse))}"
        if worse
        else "; none is shown to be worse"
    )
    return (
        f"accumulation {best} has the lowest held-out loss ({means[best]:.4g}), and up to "
        f"{max(alike)} none is shown to lie above it{more}"
    )


def _second_half(run: RunData) -> list[dict[str, Any]]:
    """Sound updates of the half in which the prediction was made."""
    return [
        one
        for one in run.updates
        if one["update"] > run.planned_updates / 2 and one["action"] == "applied"
    ]


def _tokens(run: RunData) -> float:
    full = max(one["rows"] for one in run.updates)
    return statistics.fmean(one["supervised_tokens"] for one in run.updates if one["rows"] == full)


def _norm_point(result: CellResult) -> tuple[float, float] | None:
    """(mean of 1/N, mean of |g|^2) of the second half."""
    if result.run is None or result.kind != "done":
        return None
    records = [one for one in _second_half(result.run) if one["supervised_tokens"]]
    norms = [number(one["grad_norm_pre_clip"]) for one in records]
    squares = [norm * norm for norm in norms if norm is not None and math.isfinite(norm)]
    return (
        (
            statistics.fmean(1 / one["supervised_tokens"] for one in records),
            statistics.fmean(squares),
        )
        if squares
        else None
    )


def _loss_point(result: CellResult) -> tuple[float, float] | None:
    """(1/N, 1 / fall of held-out loss)."""
    gain = result.values.get("heldout_gain")
    if result.run is None or result.kind != "done" or gain is None or not gain > 0:
        return None
    tokens = _tokens(result.run)
    return (1 / tokens, 1 / gain) if tokens else None


def _mean(values: Mapping[int, float], micro_tokens: float) -> float | None:
    return statistics.geometric_mean(values.values()) / micro_tokens if values else None
