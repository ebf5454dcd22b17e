"""A run's parts, and what happens between updates.

Evaluation, samples, checkpoints, the end.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glassloop.config import Config
from glassloop.data.batches import Batches
from glassloop.data.rows import Example, Row
from glassloop.disk.lock import FolderLock
from glassloop.formula.dist import gather_objects
from glassloop.health.decision import Outcome
from glassloop.health.inspection import Inspection
from glassloop.health.machine import Sampler
from glassloop.health.patience import HeldOut
from glassloop.health.slowness import SlowUpdates
from glassloop.loop.between import evaluate_run, evaluation_dropped, publish_checkpoint
from glassloop.loop.claim import release
from glassloop.loop.commands import generate_command, launch_command, replay_command, replay_of
from glassloop.loop.generation import EvaluationStopped
from glassloop.loop.replica import Replica
from glassloop.loop.signals import CaptureFlag, StopFlag
from glassloop.loop.watchdog import SAVES, Watchdog
from glassloop.plan.contract import Contract
from glassloop.plan.steps import StepPlan, counted
from glassloop.record.observers import Observer, RunInfo
from glassloop.record.records import Event
from glassloop.saved.changes import Notice
from glassloop.saved.state import rng_state

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase

    from glassloop.data.templates import Template
    from glassloop.loop.witness import Witness


@dataclass
class Run:
    """The parts of a run; `observers` is empty but on rank 0."""

    config: Config
    accelerator: Accelerator
    folder: Path
    header: tuple[str, ...]
    plan: StepPlan
    contract: Contract | None  # None: the loop is held to nothing (only in tests)
    batches: Batches
    heldout: Sequence[Row]
    heldout_examples: Sequence[Example]
    sample_examples: tuple[Example, ...]  # answered before and after training
    template: Template
    tokenizer: PreTrainedTokenizerBase
    replica: Replica
    stop: StopFlag
    capture: CaptureFlag
    inspection: Inspection
    watchdog: Watchdog | None = None
    machine: Sampler = field(default_factory=Sampler)
    witness: Witness | None = None  # of the GPU's allocator
    slowness: SlowUpdates = field(default_factory=SlowUpdates)  # rank 0's clock alone
    last_line: str | None = None  # for the screen, below everything else
    lock: FolderLock | None = None  # on the folder; rank 0's
    measured_gib: dict[str, float] = field(default_factory=dict)  # by phase; {} without a GPU
    changes: tuple[Notice, ...] = ()  # how this start differs from the last, or from what was asked
    observers: list[Observer] = field(default_factory=list)
    tracker_ids: Callable[[], dict[str, str]] = dict
    attach: Callable[[str, str, int], None] | None = None  # sends page and summary to trackers
    sync_records: Callable[[], None] = lambda: None  # forces what observers wrote to the disk
    tiers: dict[str, Any] | None = None  # the activations that `fused` keeps, and where
    first_update: int = 1
    at: int = 0  # the update in progress
    attempt: int = 1
    last_saved: int | None = None
    inspected: dict[str, Any] = field(init=False)  # the inspection before the update in progress
    heldout_nats: tuple[int, float] = (0, math.inf)  # (updates, newest held-out loss)
    course: HeldOut = field(default_factory=HeldOut)  # of held-out loss; the same on every rank
    best_heldout_nats: float = math.inf  # of the checkpoints so far
    base_scores: dict[str, float | None] | None = None

    def event(
        self, update: int, kind: str, message: str, command: str | None = None, **details: Any
    ) -> None:
        """Tell every observer."""
        for observer in self.observers:
            observer.on_event(Event(update, kind, message, command, details, self.attempt))

    def begin(self) -> None:
        """Print the header, and watch over the ranks from here on."""
        done = self.first_update - 1
        if self.watchdog is not None:
            self.watchdog.start()
        self.machine.start()
        if self.witness is not None:
            self.witness.attach()
        for observer in self.observers:
            observer.on_start(
                RunInfo(str(self.folder), self.plan.updates, self.replica.ranks, done, self.header)
            )

    def start(self) -> None:
        """Before the first update, evaluate and answer the samples."""
        done = self.first_update - 1
        left_out = ", ".join(map(str, sorted(self.inspection.left_out)))
        again = f", after {counted(done, 'update')}" + (
            f", without the windows of updates {left_out}" if left_out else ""
        )
        resumed = self.config.resume.run is not None
        self.event(
            done,
            "resumed" if resumed else "started",
            f"run folder {self.folder}" + (again if resumed else ""),
        )
        for notice in self.changes:
            self.event(done, notice.kind, notice.message, **notice.details)
        if self.config.resume.at is not None:
            self.save(done)  # again: it is the newest now, and knows what is left out
        if done == 0:
            self.evaluate(0)
        elif self.heldout and self.course.update < done and self.evaluation_is_due(done):
            self.evaluate(done)  # a stop came before it
            if self.checkpoint_is_due(done):
                self.save(done)

    @property
    def ends_early(self) -> bool:
        """Whether held-out loss has not fallen for evaluation.patience evaluations."""
        return self.course.exhausted(self.config.evaluation.patience)

    def evaluation_is_due(self, update: int) -> bool:
        every = self.config.evaluation.every_updates
        return update == self.plan.updates or (every is not None and update % every == 0)

    def checkpoint_is_due(self, update: int) -> bool:
        """By interval, at the end, and at the lowest held-out loss."""
        every = self.config.checkpoint.every_updates
        improved = self.heldout_nats[0] == update and self.heldout_nats[1] < self.best_heldout_nats
        return (
            update == self.plan.updates or (every is not None and update % every == 0) or improved
        )

    def does(self, update: int, what: str) -> None:
        """Tell the watchdog."""
        if self.watchdog is not None:
            self.watchdog.does(update, what)

    def lost(self, error: BaseException) -> str | None:
        """Explain an error that came from a collective; None for others."""
        return None if self.watchdog is None else self.watchdog.lost(error)

    def may_go_on(self, update: int, what: str) -> bool:
        """Tell the watchdog what comes next; False: stop asked."""
        self.does(update, what)
        return not self.stop.asked

    def remember(self, update: int) -> None:
        """Note what the coming update moves besides weights and optimizer."""
        self.at = update
        self.replica.remember()
        self.machine.begin()
        self.inspected = self.inspection.state()

    def put_back(self) -> None:
        """Undo an update that was not applied; it can run again."""
        self.replica.put_back()
        self.inspection.restore(self.inspected)

    def tell(self, outcome: Outcome) -> None:
        """Give an update to every observer, with events for what is unusual.

        Each event has the next command to type.
        """
        record, decision, u = outcome.record, outcome.decision, outcome.record.update
        slow = self.slowness.look(record, outcome.machine)
        for observer in self.observers:
            observer.on_update(record, outcome.rows)
            if outcome.machine is not None:
                machine = replace(outcome.machine, slow=None if slow is None else slow.cause)
                observer.on_machine(machine)
            if outcome.probe is not None:
                observer.on_probe(outcome.probe)
        look = replay_command(self.folder, u)
        for one in decision.findings:
            command = replay_of(one, self.folder, u)
            self.event(u, "alarm", f"{one.kind}: {one.message}", command, **one.details)
        if slow is not None:
            self.event(u, "slow", slow.message, **slow.details)
        if decision.overflow or self.replica.scale.value > self.replica.before.loss_scale:
            change = (
                f"loss scale {self.replica.before.loss_scale:g} -> {self.replica.scale.value:g}"
            )
            self.event(u, "loss_scale", f"{change}: {record.reason or 'no overflow for a while'}")
        elif record.reason is not None:
            self.event(u, "skipped", f"update {u}: {record.reason}", look if decision.bad else None)
        elif decision.max_norm != self.config.optimizer.max_grad_norm:
            self.event(
                u,
                "clipped",
                f"update {u} was clipped to the usual norm {decision.max_norm:.4g}",
                look,
            )

    def evaluate(self, update: int) -> None:
        """Evaluate after `update` updates, unless a stop interrupts it.

        All ranks take part.
        """
        self.does(update, "evaluates")
        try:
            evaluate_run(self, update)
        except EvaluationStopped:
            evaluation_dropped(self, update, "a stop was asked")

    def save(self, update: int) -> bool:
        """Publish a checkpoint after `update` updates. All ranks take part.

        Returns False, with an event, if the disk refused it.
        """
        if self.last_saved == update:
            return True
        self.does(update, SAVES)
        self.replica.require_agreement(update)
        rng_states = gather_objects(rng_state(self.replica.device))
        failure = None
        if self.replica.rank == 0:
            try:
                publish_checkpoint(self, update, rng_states)
            except OSError as error:  # CheckpointNotSaved is one
                failure = str(error)
                self.event(update, "warning", failure)
        failure = gather_objects(failure)[0]
        if self.heldout_nats[0] == update and failure is None:
            self.best_heldout_nats = min(self.best_heldout_nats, self.heldout_nats[1])
        self.last_saved = self.last_saved if failure else update
        if failure and self.config.checkpoint.on_failure == "stop":
            self.stop.asked, self.stop.by = True, "checkpoint.on_failure = stop"
        return failure is None

    def stopped(self, update: int, why: str) -> int:
        """End on demand after `update` updates, with a checkpoint.

        Exit code as StopFlag says, or 1 if the checkpoint could not be saved.
        """
        told = gather_objects(self.stop.by)  # not every rank needs to have been asked
        self.stop.by = self.stop.by or next(filter(None, told), None)
        saved = update == 0 or self.save(update)
        self.event(
            update,
            "stopped",
            f"{why} ({self.stop.by})",
            self.resume_command if update else None,
        )
        if update and saved:
            self.last_line = f"stopped after update {update}; resume: {self.resume_command}"
        return self.stop.exit_code if saved else 1

    def failed(self, update: int, why: str | None, command: str) -> int:
        """End because `update` could not be applied. Exit code 1.

        The adapters as they were before it are saved.
        """
        if update > 1:
            self.save(update - 1)
        self.event(
            update,
            "failed",
            f"update {update} was not applied: {why}",
            command if update > 1 else None,
        )
        return 1

    def broken(self, error: RuntimeError) -> int:
        """End because the run is not what it has to be.

        Exit code 1. Nothing is saved: what is in memory cannot be trusted.
        """
        self.event(
            self.at,
            "failed",
            str(error),
            self.resume_command if self.last_saved or self.first_update > 1 else None,
        )
        return 1

    def refused(self, why: str) -> int:
        """End before the first update. Exit code 2."""
        self.event(self.first_update - 1, "failed", why)
        return 2

    def finish(self, update: int) -> int:
        """End after the last update, or where evaluation.patience ran out.

        Exit code 0, or 1 if the final checkpoint could not be saved.
        """
        saved = self.save(update)
        patience = self.config.evaluation.patience
        if update < self.plan.updates and patience is not None:
            self.event(
                update,
                "finished",
                self.course.early_end(update, patience),
                f"{self.resume_command} evaluation.patience=null",
                early={"patience": patience, "best_update": self.course.best_update},
            )
        else:
            self.event(update, "finished", f"run folder {self.folder}")
        if saved:
            ask = generate_command(self.folder, self.config.data.format)
            self.last_line = f"ask it: {ask}"
        return 0 if saved else 1

    @property
    def resume_command(self) -> str:
        """The command that resumes this run."""
        command = launch_command(self.replica.ranks, on_cuda=self.replica.device.type == "cuda")
        return f"{command} --resume {shlex.quote(str(self.folder))}"

    def close_observers(self) -> None:
        """Close files, terminal and trackers; let the next writer in."""
        for observer in self.observers:
            observer.close()
        release(self.lock)

    def close(self) -> None:
        """Close observers, watchdog, signals and the process group."""
        self.close_observers()
        if not self.stop.guarded:
            self.stop.restore()
        self.capture.restore()
        self.machine.close()
        if self.witness is not None:
            self.witness.detach()
        if self.watchdog is not None:
            self.watchdog.close()
        self.accelerator.end_training()
