"""How often the detectors of glassloop/health/stability.py raise an alarm on sound updates, and how
often they see a fault.

    PYTHONPATH=. python benchmarks/detectors.py [--runs RUN_FOLDER ...] [--seeds 1] [--out
    benchmarks/results/detectors.json]

Trains clean runs of 60 updates with the real loop (a tiny Llama on this CPU, fresh and briefly
pretrained; ragged rows, tails, both layouts, two learning rates), adds recorded runs if asked to,
and draws series whose scatter is known. Then a fault is planted into the recorded numbers of one
update at a time, and the detectors are asked. What they say where none was planted is a false
alarm.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from clean_runs import UPDATES, Series, clean_runs, read_run
from detectors_asked import DEFAULTS, ask, share
from detectors_drawn import no_learning, synthetic

from glassloop.disk.environment import environment
from glassloop.health import stability
from glassloop.stats import LEAST_SIGMA, fit

# A fault is planted at the first whole window, and the first tail, from here on.
PLACES = (14, 21, 33, 47, 58)


def places(series: Series, *, tail: bool) -> list[int]:
    """Indices that a fault is planted at."""
    fits = [
        i
        for i, signals in enumerate(series.signals)
        if (signals.rows < series.rows_per_update) == tail
    ]
    found = (next((i for i in fits if series.signals[i].update >= least), None) for least in PLACES)
    return sorted({index for index in found if index is not None})


def clean(all_series: Sequence[Series]) -> dict[str, Any]:
    """False alarms on sound runs."""
    alarms = {series.name: ask(series) for series in all_series}
    after_warmup = sum(
        s.update > series.warmup_updates for series in all_series for s in series.signals
    )
    kinds = Counter(kind for found in alarms.values() for _, kind in found)
    return {
        "runs": len(all_series),
        "updates": sum(len(series.signals) for series in all_series),
        "updates_after_warmup": after_warmup,
        "tails": sum(
            s.rows < series.rows_per_update for series in all_series for s in series.signals
        ),
        "false_alarms": dict(kinds),
        "runs_with_one": [name for name, found in alarms.items() if found],
    }


def scatter(all_series: Sequence[Series]) -> dict[str, Any]:
    """How much sound log norms and log losses scatter around a line through 20 whole windows, and
    how one depends on the one before.
    """
    result = {}
    for what in ("grad_norm", "loss_nats"):
        sigmas, correlations = [], []
        for series in all_series:
            whole = [
                s
                for s in series.signals
                if s.rows == series.rows_per_update and s.update > series.warmup_updates
            ]
            for start in range(0, len(whole) - 19, 20):
                xs = [float(s.update) for s in whole[start : start + 20]]
                ys = [math.log(max(getattr(s, what), 1e-12)) for s in whole[start : start + 20]]
                line = fit(xs, ys)
                rest = [
                    y - line.mean_y - line.slope * (x - line.mean_x)
                    for x, y in zip(xs, ys, strict=True)
                ]
                sigmas.append(line.sigma)
                correlations.append(
                    sum(a * b for a, b in itertools.pairwise(rest)) / sum(a * a for a in rest)
                )
        if len(sigmas) < 2:
            continue
        result[what] = {
            "sigma_log_quartiles": [round(q, 4) for q in statistics.quantiles(sigmas, n=4)],
            "sigma_log_largest": round(max(sigmas), 4),
            "lag_1_correlation_quartiles": [
                round(q, 2) for q in statistics.quantiles(correlations, n=4)
            ],
        }
    return result


def norm_spikes(all_series: Sequence[Series], *, tail: bool) -> dict[str, Any]:
    """The gradient norm of one update times a factor."""

    def hits(factor: float) -> Iterator[bool]:
        for series in all_series:
            for place in places(series, tail=tail):
                alarms = ask(
                    series,
                    lambda s, i, at=place: (
                        replace(s, grad_norm=s.grad_norm * factor) if i == at else s
                    ),
                )
                yield (series.signals[place].update, "norm_spike") in alarms

    return {f"x{factor:g}": share(list(hits(factor))) for factor in (1.3, 2, 3, 5, 10, 50)}


def row_spikes(all_series: Sequence[Series], *, tail: bool) -> dict[str, Any]:
    """The loss of one row of the window times a factor.

    Its lightest, middle and heaviest row in turn.
    """

    def hits(factor: float, which: Callable[[list[float]], float]) -> Iterator[bool]:
        for series in all_series:
            for place in places(series, tail=tail):
                losses = sorted(series.row_losses[place])
                if not losses:
                    continue
                sound = series.signals[place]
                more = (factor - 1) * which(losses) / sound.supervised_tokens
                alarms = ask(
                    series,
                    lambda s, i, at=place, m=more: (
                        replace(s, loss_nats=s.loss_nats + m) if i == at else s
                    ),
                )
                yield (sound.update, "loss_spike") in alarms

    rows = {
        "lightest": lambda x: x[0],
        "middle": lambda x: x[len(x) // 2],
        "heaviest": lambda x: x[-1],
    }
    return {
        f"x{factor}": {name: share(list(hits(factor, which))) for name, which in rows.items()}
        for factor in (5, 10, 20, 50)
    }


def vanishing(all_series: Sequence[Series]) -> dict[str, Any]:
    """The norm falls from update 30 on; how many updates until it is told, in the middle."""
    faults: dict[str, Callable[[int], float]] = {
        "to 0 at once": lambda k: 0.0,
        "to 5 % at once": lambda k: 0.05,
        "to 1 % at once": lambda k: 0.01,
        "x 0.5 an update": lambda k: 0.5 ** (k + 1),
        "x 0.8 an update": lambda k: 0.8 ** (k + 1),
    }

    def delay(series: Series, factor: Callable[[int], float]) -> int | None:
        alarms = ask(
            series,
            lambda s, i: (
                replace(s, grad_norm=s.grad_norm * factor(s.update - 30)) if s.update >= 30 else s
            ),
        )
        return next((update - 29 for update, kind in alarms if kind == "vanishing_gradient"), None)

    result = {}
    for name, factor in faults.items():
        delays = [
            delay(series, factor) for series in all_series if series.signals[-1].update >= UPDATES
        ]
        told = [d for d in delays if d is not None]
        result[name] = {
            **share([d is not None for d in delays]),
            "updates_until": statistics.median(told) if told else None,
        }
    return result


def residuals(series: Series) -> dict[int, float]:
    """Update -> how far its loss lies off the line through its stretch of 20 whole updates, as a
    share of that line's mean.
    """
    found = {}
    whole = [s for s in series.signals if s.rows == series.rows_per_update]
    for start in range(0, len(whole), 20):
        part = whole[start : start + 20]
        if len(part) < 5:
            part = whole[-5:]
        line = fit([float(s.update) for s in part], [s.loss_nats for s in part])
        found |= {
            s.update: (s.loss_nats - line.mean_y - line.slope * (s.update - line.mean_x))
            / line.mean_y
            for s in part
        }
    return found


def stuck(all_series: Sequence[Series]) -> dict[str, Any]:
    """Clean runs whose loss is made flat.

    Each whole window's loss without the run's line, so that only its real scatter is left.
    """
    told = []
    for series in all_series:
        first = series.signals[:10]
        level = sum(s.loss_nats for s in first) / len(first)
        lines = residuals(series)
        if (
            sum(s.rows == series.rows_per_update for s in series.signals) - series.warmup_updates
            < DEFAULTS.no_learning_updates
        ):
            continue
        alarms = ask(
            series,
            lambda s, i, at=lines, flat=level: replace(
                s, loss_nats=flat * (1 + at.get(s.update, 0.0))
            ),
        )
        told.append(any(kind == "no_learning" for _, kind in alarms))
    return share(told)


def diverging(all_series: Sequence[Series]) -> dict[str, Any]:
    """From the fourth update on the loss lies at a multiple of the first one, with its own scatter.

    How many updates until it is told.
    """

    def delay(series: Series, factor: float) -> int | None:
        level, lines = factor * series.signals[0].loss_nats, residuals(series)
        alarms = ask(
            series,
            lambda s, i: (
                replace(s, loss_nats=level * (1 + lines.get(s.update, 0.0))) if s.update >= 4 else s
            ),
        )
        return next((update - 3 for update, kind in alarms if kind == "diverged"), None)

    result = {}
    for factor in (1.0, 1.2, 1.5, 2.0, 3.0):
        delays = [delay(series, factor) for series in all_series]
        told = [d for d in delays if d is not None]
        result[f"x{factor:g}"] = {
            **share([d is not None for d in delays]),
            "updates_until": statistics.median(told) if told else None,
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs",
        nargs="*",
        type=Path,
        default=[],
        help="folders of recorded runs without a fault, added to the clean ones",
    )
    parser.add_argument(
        "--seeds", type=int, default=1, help="24 clean runs are trained for each; 0: none"
    )
    parser.add_argument("--drawn", type=int, default=400, help="series drawn for each scatter")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/detectors.json"))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trained = clean_runs(Path(folder), asked.seeds) if asked.seeds else []
    recorded = [read_run(path) for path in asked.runs]
    series = [*trained, *recorded]
    if not series:
        parser.error("no runs: give --seeds or --runs")
    constants = {
        name: value
        for name, value in vars(stability).items()
        if name.isupper() and isinstance(value, int | float)
    }
    where = environment()
    result = {
        "schema": 1,
        "date": where["started"][:10],
        "machine": {"system": where["system"], "cores": os.cpu_count(), "gpus": where["gpus"]},
        "versions": {
            "glassloop": where["glassloop"],
            "python": where["python"],
            **where["packages"],
        },
        "defaults": {
            "window_updates": DEFAULTS.window_updates,
            "false_alarm_rate": DEFAULTS.false_alarm_rate,
            "no_learning_updates": DEFAULTS.no_learning_updates,
            "LEAST_SIGMA": LEAST_SIGMA,
            **constants,
        },
        "clean": clean(series),
        "clean_recorded": clean(recorded) if recorded else None,
        "scatter": scatter(series),
        "norm_times": {
            "whole window": norm_spikes(series, tail=False),
            "tail": norm_spikes(series, tail=True),
        },
        "loss_of_one_row_times": {
            "whole window": row_spikes(series, tail=False),
            "tail": row_spikes(series, tail=True),
        },
        "norm_falls_from_update_30": vanishing(series),
        "loss_made_flat": stuck(series),
        "loss_from_update_4_at_a_multiple_of_the_first": diverging(series),
        "drawn_spikes": synthetic(asked.drawn),
        "drawn_no_learning": no_learning(asked.drawn),
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(
        json.dumps(
            {name: result[name] for name in ("clean", "norm_times", "loss_of_one_row_times")},
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
