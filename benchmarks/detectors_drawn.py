"""Alarms of the detectors on drawn series of known scatter."""

from __future__ import annotations

import math
import os
import random
from collections import Counter
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from clean_runs import ROWS, UPDATES, WARMUP, Series
from detectors_asked import ask, share

from glassloop.health.signals import Signals


def drawn(
    seed: int,
    *,
    sigma: float,
    correlation: float,
    heavy: bool = False,
    fall: float = 0.0,
    updates: int = UPDATES,
) -> Series:
    """A series of log-normal norms and losses that scatter by sigma, with drift.

    `fall`: of the loss, over 40 updates.

    heavy: the scatter is Student's t with 4 degrees of freedom, scaled to sigma. Every 8th window
    is a tail of half the rows.
    """
    random_ = random.Random(f"{seed}:{sigma}:{correlation}:{heavy}:{fall}")

    def innovation() -> float:
        z = random_.gauss(0, 1)
        return z / math.sqrt(random_.gammavariate(2, 2) / 4) / math.sqrt(2) if heavy else z

    drift = random_.uniform(-0.02, 0.02)  # of the log norm, an update
    norm = loss = 0.0
    signals = []
    for u in range(1, updates + 1):
        fresh = math.sqrt(1 - correlation**2)
        norm, loss = (
            correlation * norm + fresh * innovation(),
            correlation * loss + fresh * innovation(),
        )
        rows = ROWS // 2 if u % 8 == 0 else ROWS
        more = math.sqrt(ROWS / rows - 1)  # a tail's scatter beyond that of a whole window
        trend = 2.0 * (1 - fall * (u - 1) / 40)
        log_norm = drift * u + sigma * (norm + more * innovation()) + math.log(ROWS / rows) / 4
        log_loss = math.log(trend) + sigma * (loss + more * innovation())
        signals.append(Signals(u, 2e-4, rows, 25 * rows, math.exp(log_loss), math.exp(log_norm)))
    return Series(f"drawn-{seed}", tuple(signals), ((),) * updates, ROWS, WARMUP)


def synthetic(count: int) -> list[dict[str, Any]]:
    """False alarms of the two spike detectors on drawn series, by scatter, correlation and weight
    of the tails.
    """
    result = []
    for heavy in (False, True):
        for sigma in (0.05, 0.1, 0.2, 0.4):
            for correlation in (0.0, 0.5, 0.9):
                counts = Counter(
                    kind
                    for seed in range(count)
                    for _, kind in ask(
                        drawn(seed, sigma=sigma, correlation=correlation, heavy=heavy, fall=0.2)
                    )
                )
                where = {
                    "sigma_log": sigma,
                    "lag_1_correlation": correlation,
                    "scatter": "Student t, 4" if heavy else "normal",
                }
                updates = count * (UPDATES - WARMUP)
                result.append(
                    {
                        **where,
                        "updates": updates,
                        "norm_spikes": counts["norm_spike"],
                        "loss_spikes": counts["loss_spike"],
                    }
                )
    return result


def no_learning(count: int) -> list[dict[str, Any]]:
    """Share of drawn runs of 60 updates that are said not to learn, by how much the loss falls over
    40 updates and how it scatters.
    """
    result = []
    for sigma in (0.01, 0.03, 0.05, 0.1):
        for fall in (0.0, 0.02, 0.05, 0.1, 0.2):
            runs = (drawn(seed, sigma=sigma, correlation=0.0, fall=fall) for seed in range(count))
            told = [any(kind == "no_learning" for _, kind in ask(run)) for run in runs]
            result.append({"sigma": sigma, "fall_over_40_updates": fall, **share(told)})
    return result
