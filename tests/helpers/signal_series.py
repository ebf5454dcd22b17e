"""Series of signals, sound and faulty, and the findings that they raise."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from glassloop.config import StabilityConfig
from glassloop.health.signals import Finding, Signals
from glassloop.health.stability import (
    Detectors,
)

DEFAULTS = {
    name: getattr(StabilityConfig(), name)
    for name in ("window_updates", "false_alarm_rate", "no_learning_updates")
}
Told = list[tuple[int, str]]


def detectors(**changes: Any) -> Detectors:
    return Detectors(**{"rows_per_update": 16, "warmup_updates": 5, **DEFAULTS, **changes})


def sound(
    updates: int = 60, *, sigma: float = 0.1, fall: float = 0.3, seed: int = 0, tails: bool = True
) -> list[Signals]:
    """A sound run whose log norm and log loss scatter by sigma.

    Its loss falls by `fall` to the end. Every 8th window is a tail of 8 rows.
    """
    drawn = random.Random(seed)
    result = []
    for u in range(1, updates + 1):
        rows = 8 if tails and u % 8 == 0 else 16
        wide = math.sqrt(16 / rows)
        loss = 2.0 * (1 - fall * u / updates) * math.exp(sigma * wide * drawn.gauss(0, 1))
        norm = 0.8 * wide * math.exp(sigma * wide * drawn.gauss(0, 1))
        result.append(
            Signals(
                update=u,
                lr=2e-4,
                rows=rows,
                supervised_tokens=25 * rows,
                loss_nats=loss,
                grad_norm=norm,
            )
        )
    return result


def told(
    series: Iterable[Signals],
    watching: Detectors | None = None,
    *,
    applied: Callable[[Finding], bool] = lambda _: True,
) -> Told:
    """(update, kind) of all findings.

    `applied` says whether an update with this finding moves the optimizer.
    """
    watching = watching or detectors()
    found = []
    for signals in series:
        findings = watching.look(signals)
        watching.note(signals, findings, all(map(applied, findings)))
        found += [(signals.update, finding.kind) for finding in findings]
    return found


def at(update: int, series: list[Signals], **factors: float) -> list[Signals]:
    """The series with fields of one update multiplied."""
    return [
        replace(s, **{name: getattr(s, name) * factor for name, factor in factors.items()})
        if s.update == update
        else s
        for s in series
    ]


def since(
    update: int, series: list[Signals], **change: Callable[[Signals], float]
) -> list[Signals]:
    """The series with fields changed from one update on."""
    return [
        replace(s, **{n: f(s) for n, f in change.items()}) if s.update >= update else s
        for s in series
    ]


def losses(values: Iterable[float], rows: int = 16) -> list[Signals]:
    return [Signals(u, 2e-4, rows, 25 * rows, loss, 0.8) for u, loss in enumerate(values, start=1)]
