"""What a replay computes with: the model, adapters, optimizer and loss scale of a run, on one process and without anything that a run writes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from glassloop.config.config import Config
from glassloop.data.batches import Batches
from glassloop.data.rows import Row
from glassloop.engines.peft import build_engine
from glassloop.formula.optim import FlatAdapters, LossScale
from glassloop.health.inspection import make_inspection
from glassloop.loop.build import optimizer_of
from glassloop.loop.launch import make_accelerator
from glassloop.loop.run import Run
from glassloop.loop.signals import CaptureFlag, StopFlag
from glassloop.plan.steps import StepPlan
from glassloop.saved import state as snapshots


@dataclass(frozen=True)
class State:
    """What an update starts from: adapters, optimizer and every rank's random numbers."""

    flat: Tensor  # (N,) fp32 on the CPU
    moments: tuple[dict[str, Tensor], Any]  # optimizer state, see snapshots.optimizer_state
    rng_states: tuple[dict[str, Any], ...]  # by rank, before its passes
    loss_scale: float


def make_parts(
    config: Config,
    accelerator: Accelerator | None,
    *,
    pad_id: int,
    rows: Sequence[Row],
    rank: int = 0,
) -> Run:
    """Model, adapters, optimizer and loss scale as the run had them, on this process's device and without what a run writes.

    Args:
        accelerator: of earlier parts, which must be done with by now; None makes one. fp32 needs none, so that a bf16 run's can be varied.
        rank: whose random numbers the parts leave behind, as in build_run.
    """
    execution = config.execution.model_copy(update={"reduction": "explicit"})
    record = config.record.model_copy(
        update={"probe_every_updates": None}
    )  # a probe would hold gradients back for nobody
    config = config.model_copy(update={"execution": execution, "record": record})
    if accelerator is None:
        accelerator = make_accelerator(config)
    else:
        accelerator.free_memory()  # it holds on to the engines that it prepared
    device = accelerator.device if accelerator.device.type == "cuda" else torch.device("cpu")
    set_seed(config.seed + rank)
    engine = build_engine(
        config.model,
        config.lora,
        precision=execution.precision,
        checkpointing=execution.checkpointing,
        seed=config.seed,
        device=device,
        first=contextlib.nullcontext,
        engine=execution.engine,
        longest_row=config.data.max_tokens,
    )
    largest = engine.hf.get_base_model().get_input_embeddings().num_embeddings  # type: ignore[operator, union-attr]
    if odd := [row.row_id for row in rows if max(row.input_ids) >= largest]:
        raise ValueError(
            f"model.id = {config.model.id} knows token ids below {largest}, row {odd[0]} has {max(max(r.input_ids) for r in rows)}: "
            "name the base that the update was made on with --base"
        )
    prepared = engine
    if execution.precision != "fp32":
        prepared = accelerator.prepare_model(
            engine, device_placement=False, evaluation_mode=True
        )  # autocast, as in the run
    adapters = FlatAdapters(engine.hf.named_parameters())
    stability = config.stability
    return Run(
        config=config,
        accelerator=accelerator,
        folder=Path(),
        header=(),
        plan=cast(
            StepPlan, None
        ),  # a replay knows its lr, and has no schedule, template or samples
        batches=Batches(
            tuple(rows),
            cast(StepPlan, None),
            config.seed,
            execution.layout,
            execution.pass_tokens or 0,
        ),
        heldout=(),
        heldout_examples=(),
        sample_examples=(),
        engine=prepared,
        plain_engine=engine,
        template=cast(Any, None),
        tokenizer=cast(Any, None),
        adapters=adapters,
        optimizer=optimizer_of(config, adapters),
        scale=LossScale(
            stability.initial_loss_scale,
            stability.loss_scale_growth_updates,
            enabled=execution.precision == "fp16",
        ),
        rank=0,
        ranks=1,
        device=device,
        pad_id=pad_id,
        stop=StopFlag(),
        capture=CaptureFlag(),
        inspection=make_inspection(
            config, rows=len(rows), rows_per_update=max(1, len(rows)), explicit=True
        ),
    )


def state_of(run: Run, rng_states: Sequence[dict[str, Any]]) -> State:
    """A copy of what the parts hold now."""
    moments = snapshots.optimizer_state(run.optimizer, run.adapters.flat)
    return State(
        run.adapters.flat.detach().cpu().clone(), moments, tuple(rng_states), run.scale.value
    )
