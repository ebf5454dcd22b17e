"""Ask the detectors, at their defaults, about a series."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from clean_runs import Series

from glassloop.config import StabilityConfig
from glassloop.health.signals import Signals
from glassloop.health.stability import Detectors

DEFAULTS = StabilityConfig()
Alarm = tuple[int, str]  # update, kind


def ask(series: Series, change: Callable[[Signals, int], Signals] | None = None) -> list[Alarm]:
    """What the detectors, at their defaults, say of a series.

    `change` gets each update and its index.
    """
    detectors = Detectors(
        rows_per_update=series.rows_per_update,
        warmup_updates=series.warmup_updates,
        window_updates=DEFAULTS.window_updates,
        false_alarm_rate=DEFAULTS.false_alarm_rate,
        no_learning_updates=DEFAULTS.no_learning_updates,
    )
    alarms = []
    for index, sound in enumerate(series.signals):
        signals = change(sound, index) if change else sound
        findings = detectors.look(signals)
        detectors.note(signals, findings, applied=True)
        alarms += [(signals.update, finding.kind) for finding in findings]
    return alarms


def share(hits: Sequence[bool]) -> dict[str, Any]:
    return {
        "detected": sum(hits),
        "of": len(hits),
        "rate": round(sum(hits) / len(hits), 3) if hits else None,
    }
