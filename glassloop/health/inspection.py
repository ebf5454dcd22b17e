"""What is read of an update besides the formula: detectors, noise scale, probes, capsules. Nothing here changes a weight or a gradient.

Every rank holds the same Inspection and feeds it the same numbers, so that all decide alike.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from glassloop.config.config import Config, RecordConfig, StabilityConfig, as_dict
from glassloop.data.batches import Batches, Window
from glassloop.formula.dist import Gate, gather_objects
from glassloop.formula.optim import FlatAdapters, l2_norm
from glassloop.health.decision import Decision, Terms, decide, signals_of
from glassloop.health.noise import NoiseScale
from glassloop.health.probes import Before, first_nonfinite, read_after, read_before
from glassloop.health.stability import Detectors, Finding
from glassloop.record.records import ProbeRecord
from glassloop.saved.capsule import CapsuleNotSaved, facts_of, save_capsule

if TYPE_CHECKING:
    from glassloop.loop.run import Run


@dataclass
class Inspection:
    """Built once a run. `state` goes into checkpoints."""

    stability: StabilityConfig
    record: RecordConfig
    max_norm: float | None  # of optimizer.max_grad_norm
    explicit: bool  # each rank's gradient is known before reduction
    healthy_at: int  # the update whose capsule is kept to compare with, if it is sound
    detectors: Detectors
    noise: NoiseScale = field(default_factory=NoiseScale)
    left_out: frozenset[int] = frozenset()  # windows taken out of the run on demand
    half: tuple[Tensor, int] | None = (
        None  # one rank: its gradient and supervised tokens half-way through a probed update
    )

    def probe_due(self, update: int) -> bool:
        every = self.record.probe_every_updates
        return every is not None and update % every == 0

    def half_way(self, window: Window) -> int | None:
        """The pass after which a lone rank's gradient is read for the noise scale; None where nothing is read."""
        passes = next(iter(window.passes))
        return (
            len(passes) // 2 - 1
            if len(window.passes) == 1 and len(passes) > 1 and self.probe_due(window.update)
            else None
        )

    def decide(
        self, batches: Batches, window: Window, gate: Gate, adapters: FlatAdapters, terms: Terms
    ) -> Decision:
        """What becomes of the update; its numbers then belong to what later ones are compared with."""
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

    def note_noise(self, gate: Gate, grad: Tensor, terms: Terms) -> float | None:
        """Take the update's parts, ranks or halves, into the noise scale; returns it as it stands now, in supervised tokens.

        Call it while `grad` is g * scale. None where parts are unknown in this update: under ddp with several ranks, between probes of one rank.
        """
        if len(gate.reports) > 1 and self.explicit:
            norms = [report.grad_norm / terms.scale for report in gate.reports]
            tokens = [report.supervised_tokens for report in gate.reports]
        elif self.half is not None:
            first, counted = self.half
            norms = [l2_norm(part).item() / terms.scale for part in (first, grad - first)]
            tokens = [counted, sum(report.supervised_tokens for report in gate.reports) - counted]
            self.half = None
        else:
            return None
        self.noise.add(norms, tokens, terms.norm)
        return self.noise.tokens

    def capsule_reason(self, update: int, gate: Gate, decision: Decision) -> str | None:
        """Why this update is kept whole, or None."""
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
        """Go on from `state()`; one of an older checkpoint may lack parts. Raises ValueError where it is malformed."""
        if "detectors" in state:
            self.detectors.restore(state["detectors"])
        if "noise" in state:
            self.noise.restore(state["noise"])
        self.left_out |= frozenset(state.get("left_out", ()))


def make_inspection(
    config: Config, *, rows: int, rows_per_update: int, explicit: bool
) -> Inspection:
    """rows: of the training set. rows_per_update: of a whole window."""
    stability = config.stability
    return Inspection(
        stability=stability,
        record=config.record,
        max_norm=config.optimizer.max_grad_norm,
        explicit=explicit,
        healthy_at=config.schedule.warmup_updates + 1,
        detectors=Detectors(
            rows_per_update=min(rows, rows_per_update),
            warmup_updates=config.schedule.warmup_updates,
            window_updates=stability.window_updates,
            false_alarm_rate=stability.false_alarm_rate,
            no_learning_updates=stability.no_learning_updates,
        ),
        left_out=frozenset(config.resume.without_windows),
    )


@dataclass(frozen=True)
class Look:
    """What was read before the optimizer moved, and how long that took."""

    noise: float | None
    before: Before | None  # of a probe
    seconds: float


def look_before_step(
    run: Run, window: Window, gate: Gate, decision: Decision, terms: Terms
) -> Look:
    """Noise scale, probe and capsule of an update while `grad` is g * scale and the optimizer has not moved. All ranks take part."""
    started = time.perf_counter()
    inspection = run.inspection
    noise = inspection.note_noise(gate, run.adapters.grad, terms) if terms.n else None
    before = (
        read_before(run.adapters, terms.scale)
        if terms.n and inspection.probe_due(window.update) and run.rank == 0
        else None
    )
    why = inspection.capsule_reason(window.update, gate, decision) if terms.n else None
    if why is not None:
        keep_capsule(run, window, gate, why, terms)
    return Look(noise, before, time.perf_counter() - started)


def probe_of(run: Run, update: int, before: Before | None, applied: bool) -> ProbeRecord | None:
    """The probe of an update after its step, where one was begun before it."""
    if before is None:
        return None
    scaling = run.config.lora.alpha / run.config.lora.r
    return read_after(
        before, run.adapters, update=update, applied=applied, scaling=scaling, attempt=run.attempt
    )


def keep_capsule(run: Run, window: Window, gate: Gate, why: str, terms: Terms) -> None:
    """Write the update whole, on rank 0. A disk that refuses costs the capsule and not the run."""
    rng_states = gather_objects(run.before.rng)
    if run.rank != 0:
        return
    record = run.config.record
    facts = facts_of(
        window=window,
        batches=run.batches,
        gate=gate,
        why=why,
        attempt=run.attempt,
        lr=terms.lr,
        n=terms.n,
        norm=terms.norm,
        scale=terms.scale,
        finite_updates=run.before.finite_updates,
        max_norm=run.config.optimizer.max_grad_norm,
        explicit=not run.ddp,
        pad_id=run.pad_id,
        base_hash=run.plain_engine.report.base_hash,
        config=as_dict(run.config),
        device=run.device,
    )
    try:
        saved = save_capsule(
            run.folder / "capsules",
            facts,
            text=record.text,
            adapters=run.adapters,
            optimizer=run.optimizer,
            rng_states=rng_states,
            keep=record.capsules,
            most_gib=record.capsules_gib,
        )
    except CapsuleNotSaved as error:
        run.event(window.update, "warning", str(error))
        return
    if saved.path is not None:
        run.event(
            window.update,
            "capsule",
            f"kept whole ({why}): {saved.path}",
            replay_command(run.folder, window.update),
        )
    if saved.note is not None:
        run.event(window.update, "warning", saved.note)


def replay_command(folder: Path, update: int) -> str:
    """What to type to find out what made an update what it was."""
    return f"glassloop replay {folder} --update {update} --bisect"


def replay_of(finding: Finding, folder: Path, update: int) -> str:
    """The same for a finding about `update`. Divergence is told when it has lasted: its cause is the step before the loss first stood high."""
    if finding.kind == "diverged":
        return f"{replay_command(folder, max(1, int(finding.details['since']) - 1))} --try"
    return replay_command(folder, update)
