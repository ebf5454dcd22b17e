"""Read-only checks on an update: detectors, noise scale, probes, capsules.

Every rank holds the same Inspection and feeds it the same numbers, so that all decide alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from glassloop.config import Config, RecordConfig, StabilityConfig
from glassloop.data.batches import Batches, Window
from glassloop.formula.dist import Gate
from glassloop.formula.optim import FlatAdapters, l2_norm
from glassloop.health.decision import Decision, Terms, decide, signals_of
from glassloop.health.noise import NoiseScale
from glassloop.health.probes import first_nonfinite
from glassloop.health.stability import Detectors


@dataclass
class Inspection:
    """Built once a run. `state` goes into checkpoints."""

    stability: StabilityConfig
    record: RecordConfig
    max_norm: float | None  # of optimizer.max_grad_norm
    healthy_at: int  # the update whose capsule is kept to compare with, if it is sound
    detectors: Detectors
    noise: NoiseScale = field(default_factory=NoiseScale)
    left_out: frozenset[int] = frozenset()  # windows taken out of the run on demand

    def probe_due(self, update: int) -> bool:
        every = self.record.probe_every_updates
        return every is not None and update % every == 0

    def half_way(self, window: Window) -> int | None:
        """The pass after which a lone rank's gradient is copied; None: none.

        The noise scale needs it.
        """
        passes = next(iter(window.passes))
        return (
            len(passes) // 2 - 1
            if len(window.passes) == 1 and len(passes) > 1 and self.probe_due(window.update)
            else None
        )

    def decide(
        self, batches: Batches, window: Window, gate: Gate, adapters: FlatAdapters, terms: Terms
    ) -> Decision:
        """Decide on the update, and remember its numbers for later ones."""
        finite = all(math.isfinite(report.largest_weight) for report in gate.reports)
        decision = decide(
            batches,
            window,
            gate,
            self.detectors,
            self.stability,
            terms,
            left_out=window.update in self.left_out,
            broken_weight=None if finite else first_nonfinite(adapters),
            max_norm=self.max_norm,
        )
        if terms.n and not decision.nonfinite and not decision.overflow:
            signals = signals_of(window, gate, terms)
            self.detectors.note(signals, decision.findings, applied=decision.reason is None)
        return decision

    def note_noise(
        self, gate: Gate, grad: Tensor, terms: Terms, half: tuple[Tensor, int] | None
    ) -> float | None:
        """Add the update's parts to the noise scale; return it, in tokens.

        Parts are ranks, or halves of a lone rank's passes.

        Call it while `grad` is g * scale. Returns None if the update has no known parts: under ddp
        with several ranks, between probes of one rank.

        Args:
            half: a lone rank's gradient and supervised tokens half-way through its passes.
        """
        if len(gate.reports) > 1 and terms.explicit:
            norms = [report.grad_norm / terms.scale for report in gate.reports]
            tokens = [report.supervised_tokens for report in gate.reports]
        elif half is not None:
            first, counted = half
            norms = [l2_norm(part).item() / terms.scale for part in (first, grad - first)]
            tokens = [counted, sum(report.supervised_tokens for report in gate.reports) - counted]
        else:
            return None
        self.noise.add(norms, tokens, terms.norm)
        return self.noise.tokens

    def capsule_reason(self, update: int, gate: Gate, decision: Decision) -> str | None:
        """The reason to keep this update whole, or None."""
        if self.record.capsules == 0:
            return None
        if decision.bad is not None:
            return decision.bad
        if gate.capture or update in self.record.capture_updates:
            return "asked"
        if update != self.healthy_at or decision.reason is not None:
            return None
        return (
            None if self.detectors.above_in_a_row else "healthy"
        )  # or a run that is diverging would be its own measure

    def state(self) -> dict[str, Any]:
        """Plain JSON, for a checkpoint."""
        return {
            "detectors": self.detectors.state(),
            "noise": self.noise.state(),
            "left_out": sorted(self.left_out),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore `state()`; that of an older checkpoint may lack parts.

        Raises ValueError if it is malformed.
        """
        if "detectors" in state:
            self.detectors.restore(state["detectors"])
        if "noise" in state:
            self.noise.restore(state["noise"])
        self.left_out |= frozenset(state.get("left_out", ()))


def make_inspection(config: Config, *, rows: int, rows_per_update: int) -> Inspection:
    """Build the run's Inspection.

    Args:
        rows: of the training set. rows_per_update: of a whole window.
    """
    stability, warmup = config.stability, config.schedule.warmup_updates
    assert warmup is not None  # config.settled
    return Inspection(
        stability=stability,
        record=config.record,
        max_norm=config.optimizer.max_grad_norm,
        healthy_at=warmup + 1,
        detectors=Detectors(
            rows_per_update=min(rows, rows_per_update),
            warmup_updates=warmup,
            window_updates=stability.window_updates,
            false_alarm_rate=stability.false_alarm_rate,
            no_learning_updates=stability.no_learning_updates,
        ),
        left_out=frozenset(config.resume.without_windows),
    )
