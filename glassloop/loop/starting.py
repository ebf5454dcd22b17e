"""The first stages of a start: past, launch, engine, rows.

What is cheap to refuse comes first.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glassloop.base.source import BaseSource, locate_base, vocabulary_of
from glassloop.base.tokenizer import load_tokenizer
from glassloop.config import Config, as_dict, settled
from glassloop.data.batches import Batches
from glassloop.data.dataset import Dataset
from glassloop.data.reading import read_dataset
from glassloop.disk.lock import FolderLock
from glassloop.formula.dist import in_turn, one_first, require_same
from glassloop.health.patience import HeldOut, heldout_from
from glassloop.loop.changed import recorded_config
from glassloop.loop.claim import claim, digests_of
from glassloop.loop.conditions import check_rows
from glassloop.loop.engine_here import check_split, engine_here, with_linear_names
from glassloop.loop.folder import run_folder
from glassloop.loop.launch import check_launch, hush, make_accelerator
from glassloop.loop.same_program import require_same_program
from glassloop.loop.signals import CaptureFlag, StopFlag
from glassloop.plan.engine import in_words, with_engine
from glassloop.plan.outlook import plan_of
from glassloop.plan.targets import check_tokens
from glassloop.plan.work import pass_tokens_for
from glassloop.record.tracker_checks import check_tracking
from glassloop.saved.checkpoint import read_state
from glassloop.saved.resuming import (
    after_restart,
    beginning,
    find_checkpoint,
    position,
    read_plan,
    reshaped,
    sums_of,
    with_past,
)
from glassloop.saved.run_state import RunState

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Past:
    """The folder of the run to resume; empty for a new run."""

    checkpoint: Path | None = None  # None: from the beginning
    saved: RunState | None = None  # where the run stands
    recorded: Config | None = None  # its config.yaml
    plan: dict[str, Any] = field(default_factory=dict)  # its plan.json
    passed_over: tuple[str, ...] = ()  # a note for each checkpoint that is not whole
    sums: str = sums_of(None)  # of the checkpoint, before it was read
    digests: dict[str, str] = field(default_factory=dict)  # of its files, before they were read


@dataclass(frozen=True)
class Start:
    """The state of a start before data and model are read."""

    asked: Config  # execution.engine may be auto
    config: Config  # the engine has its name
    source: BaseSource
    vocabulary: int  # rows of the base's embedding
    past: Past
    warnings: tuple[str, ...]  # checkpoints that are not whole, an engine that is not sound
    auto: str  # the choice of execution.engine = auto, in words
    accelerator: Accelerator
    first: Callable[[], AbstractContextManager[Any]]  # one rank of a host before the others
    folder: Path
    lock: FolderLock | None  # on the folder; rank 0's
    stop: StopFlag
    capture: CaptureFlag


@dataclass(frozen=True)
class Rows:
    """The rows of a run and their order."""

    tokenizer: PreTrainedTokenizerBase
    dataset: Dataset
    batches: Batches
    updates_done: int
    tracker_ids: dict[str, str]


def past_of(config: Config) -> tuple[Config, Past]:
    """Read the run to resume; return the config too.

    It keeps the run in its folder.
    """
    if config.resume.run is None:
        return config, Past()
    folder, ranks = Path(config.resume.run), int(os.environ.get("WORLD_SIZE", "1"))
    digests = digests_of(folder)
    checkpoint, passed_over = find_checkpoint(config)
    sums = sums_of(checkpoint)
    plan, recorded = read_plan(folder), recorded_config(folder)
    saved = read_state(checkpoint) if checkpoint else beginning(as_dict(recorded), plan, ranks)
    config = config.model_copy(update={"run": recorded.run})
    if config.resume.reshape:
        config = reshaped(config, saved, ranks)
    check_not_ended_early(config, saved)
    return config, Past(checkpoint, saved, recorded, plan, passed_over, sums, digests)


def check_not_ended_early(config: Config, saved: RunState) -> None:
    """Raise ValueError if evaluation.patience has run out already."""
    patience, state = config.evaluation.patience, saved.details.get("heldout")
    course = HeldOut() if state is None else heldout_from(state)
    if patience is not None and course.exhausted(patience):
        raise ValueError(
            f"resume.run = {config.resume.run} {course.early_end(saved.update, patience)}. To "
            f"train further, set evaluation.patience to more than {course.worse_in_a_row}, or to "
            "null"
        )


def start_ranks(config: Config, stop: StopFlag | None) -> Start:
    """Check launch and config, meet the other ranks, choose the engine."""
    config, past = past_of(after_restart(config))
    check_launch(config)
    check_tracking(config.tracking)
    accelerator = make_accelerator(config)
    require_same_program(config)
    stop, capture = stop or StopFlag(), CaptureFlag()
    stop.listen()
    capture.listen()
    hush(accelerator.process_index)
    first = partial(one_first, accelerator.is_local_main_process)
    source, values = in_turn(first, lambda: locate_base(config.model), "reading the model's config")
    check_tokens(config.lora, values)
    config = with_linear_names(config, source, values, first)
    choice = engine_here(config, past.checkpoint, past.plan, values)
    check_split(config, values, accelerator.num_processes)
    folder = run_folder(config)
    lock = claim(folder, config, past.sums, past.digests, rank=accelerator.process_index)
    return Start(
        asked=config,
        config=with_engine(config, choice),
        source=source,
        vocabulary=vocabulary_of(values),
        past=past,
        warnings=(*past.passed_over, *(lock.notes if lock else ())),
        auto=in_words(config, choice),
        accelerator=accelerator,
        first=first,
        folder=folder,
        lock=lock,
        stop=stop,
        capture=capture,
    )


def read_rows(start: Start) -> Rows:
    """Read tokenizer and data, and put the rows in order.

    All ranks must find the same.
    """
    config, run = start.config, start.config.resume.run

    def read() -> tuple[Any, Dataset]:
        tokenizer = load_tokenizer(config.model, start.source)
        return tokenizer, read_dataset(config, lambda: tokenizer, texts=config.evaluation.samples)

    tokenizer, dataset = in_turn(start.first, read, "reading tokenizer and data")
    check_rows(config, dataset, tokenizer, start.vocabulary)
    plan = plan_of(config, len(dataset.train.rows), start.accelerator.num_processes)
    cure = "copy the run's folder of one host to the others, or name one with --at"
    require_same("checkpoints to resume from", sums_of(start.past.checkpoint), cure)
    done, tracker_ids = position(start.past.checkpoint, plan, run)
    batches = Batches(
        rows=dataset.train.rows,
        plan=with_past(plan, start.past.plan, done),
        seed=config.seed,
        layout=config.execution.layout,
        pass_tokens=pass_tokens_for(config, None, None),
        two_passes_every=config.record.probe_every_updates,
    )
    check_shared_rows(batches)
    cure = "the ranks read different data or tokenizers; give every host the same files"
    require_same("training rows", dataset.digest, cure)
    return Rows(tokenizer, dataset, batches, done, tracker_ids)


def check_shared_rows(batches: Batches) -> None:
    """Raise ValueError for a row with fewer tokens than ranks."""
    ranks, lengths = batches.plan.ranks, batches.lengths
    if not batches.split or min(lengths) >= ranks:
        return
    row = batches.rows[min(range(len(lengths)), key=lengths.__getitem__)]
    raise ValueError(
        f"execution.layout = split: row {row.row_id} has {len(row)} tokens, fewer than the {ranks} "
        "ranks that share it: leave it out, or set execution.layout=packed"
    )


def settle(start: Start, rows: Rows) -> Start:
    """Name the template and the warmup that tokenizer and rows decided.

    The folder keeps them under these names.
    """
    template, warmup = rows.dataset.template.name, rows.batches.plan.warmup
    return replace(
        start,
        asked=settled(start.asked, template=template, warmup_updates=warmup),
        config=settled(start.config, template=template, warmup_updates=warmup),
    )
