"""Evaluations and checkpoints of a run, between two updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from glassloop.base.dropped import free_dropped
from glassloop.config import as_dict
from glassloop.loop.commands import evaluate_command
from glassloop.loop.evaluation import Answer, answer_together, evaluate
from glassloop.loop.generation import EvaluationLacksMemory, EvaluationSetup
from glassloop.record.records import EvaluationRecord, SampleRecord
from glassloop.saved.checkpoint import save_checkpoint
from glassloop.saved.run_state import RunState

if TYPE_CHECKING:
    from pathlib import Path

    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase

    from glassloop.config import Config
    from glassloop.data.batches import Batches
    from glassloop.data.rows import Example, Row
    from glassloop.data.templates import Template
    from glassloop.health.inspection import Inspection
    from glassloop.health.patience import HeldOut
    from glassloop.loop.replica import Replica
    from glassloop.loop.signals import StopFlag
    from glassloop.plan.steps import StepPlan
    from glassloop.record.observers import Observer


class Underway(Protocol):
    """The parts of a Run that an evaluation or a checkpoint uses."""

    config: Config
    accelerator: Accelerator
    folder: Path
    plan: StepPlan
    batches: Batches
    heldout: Sequence[Row]
    heldout_examples: Sequence[Example]
    sample_examples: tuple[Example, ...]
    template: Template
    tokenizer: PreTrainedTokenizerBase
    replica: Replica
    stop: StopFlag
    inspection: Inspection
    observers: list[Observer]
    tracker_ids: Callable[[], dict[str, str]]
    sync_records: Callable[[], None]
    tiers: dict[str, Any] | None
    attempt: int
    heldout_nats: tuple[int, float]
    course: HeldOut
    base_scores: dict[str, float | None] | None

    @property
    def ends_early(self) -> bool: ...

    def event(
        self, update: int, kind: str, message: str, command: str | None = None, **details: Any
    ) -> None: ...


def evaluate_run(run: Underway, update: int) -> None:
    """Evaluate held-out rows, and answer samples at both ends of a run.

    All ranks take part. An evaluation that a card has no room for is dropped and said: training
    needs none. Raises EvaluationStopped, on all of them, if a stop was asked.
    """
    try:
        _evaluate(run, update)
    except EvaluationLacksMemory as error:
        settings = run.config.evaluation
        evaluation_dropped(
            run,
            update,
            f"{error}. Lower evaluation.generate_batch (now {settings.generate_batch}), "
            f"evaluation.max_new_tokens ({settings.max_new_tokens}) or batch.size",
        )
    else:
        return
    free_dropped(run.replica.device)  # once the error holds nothing any more


def evaluation_dropped(run: Underway, update: int, why: str) -> None:
    """Say that an evaluation is lacking, and how to make it afterwards."""
    run.event(
        update,
        "warning",
        f"the evaluation after update {update} was dropped: {why}",
        evaluate_command(run.folder) if update else None,
    )


def _evaluate(run: Underway, update: int) -> None:
    settings, replica = run.config.evaluation, run.replica
    setup = EvaluationSetup(
        template=run.template,
        tokenizer=run.tokenizer,
        stop_ids=tuple(run.template.stop_ids),
        pad_id=replica.pad_id,
        batch_size=run.config.batch.size,
        answer_batch=settings.generate_batch,
        max_new_tokens=settings.max_new_tokens,
        device=replica.device,
        autocast=run.accelerator.autocast,  # type: ignore[arg-type]  # its own default is None
        rank=replica.rank,
        ranks=replica.ranks,
        stopped=lambda: run.stop.asked,
    )
    answers: list[Answer] = []
    if run.heldout:
        # Fresh adapters change nothing, so the scores before the first update are the base's.
        fresh = update == 0 and run.config.model.init_adapter is None
        record, answers = evaluate(
            replica.plain_engine,
            run.heldout,
            run.heldout_examples,
            setup,
            generate_rows=settings.generate_rows,
            with_base=not fresh and run.base_scores is None,
            update=update,
            attempt=run.attempt,
        )
        run.base_scores = record.scores if fresh else (run.base_scores or record.base)
        _tell(run, replace(record, base=run.base_scores))
    ends = update in (0, run.plan.updates) or run.ends_early
    if ends and settings.samples:
        if not answers and run.sample_examples:
            answers = answer_together(replica.plain_engine.hf, run.sample_examples, setup)
        for answer in answers[: settings.samples]:
            _show(run, answer, update)


def _tell(run: Underway, record: EvaluationRecord) -> None:
    run.heldout_nats = (record.update, record.loss_nats)
    run.course = run.course.after(record.update, record.loss_nats)
    for observer in run.observers:
        observer.on_evaluation(record)


def _show(run: Underway, answer: Answer, update: int) -> None:
    sample = SampleRecord(
        update=update,
        row_id=answer.row_id,
        base=update == 0 and run.config.model.init_adapter is None,
        prompt=answer.prompt,
        expected=answer.reference,
        answer=answer.answer,
        answer_tokens=answer.tokens,
        attempt=run.attempt,
    )
    for observer in run.observers:
        observer.on_sample(sample)


def publish_checkpoint(run: Underway, update: int, rng_states: list[dict[str, Any]]) -> None:
    """Write the checkpoint after `update` updates, on rank 0.

    Raises OSError if the disk refuses it or the records before it.
    """
    replica, report = run.replica, run.replica.plain_engine.report
    state = RunState(
        update=update,
        epoch=max(update - 1, 0) // run.plan.windows_per_epoch,
        world_size=replica.ranks,
        base_hash=report.base_hash,
        config=as_dict(run.config),
        attempt=run.attempt,
        loss_scale=replica.scale.value,
        finite_updates=replica.scale.finite_updates,
        heldout_loss_nats=run.heldout_nats[1] if run.heldout_nats[0] == update else None,
        tracker_ids=run.tracker_ids(),
        details={
            **run.inspection.state(),
            "halvings": run.batches.halvings,
            "tiers": run.tiers,
            "heldout": run.course.state(),
        },
    )
    run.sync_records()  # first: with a checkpoint, the records of its updates are on the disk
    saved = save_checkpoint(
        run.folder / "checkpoints",
        state,
        adapters=replica.adapters,
        peft_model=replica.plain_engine.hf,
        tokenizer=run.tokenizer,
        chat_template=run.template.chat_template,
        base_id=report.name,
        base_revision=report.commit,
        optimizer=replica.optimizer,
        rng_states=rng_states,
        keep=run.config.checkpoint.keep,
    )
    best = " (best held-out loss so far)" if saved.best == saved.path else ""
    run.event(update, "checkpoint", f"saved {saved.path}{best}")
    for note in saved.notes:
        run.event(update, "warning", note)
