"""The replica that a replay computes with.

It is a run's replica, on one process, without anything that a run writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from glassloop.config import Config
from glassloop.data.rows import Row
from glassloop.loop.launch import make_accelerator
from glassloop.loop.replica import Replica, adapters_of, build_replica, device_of, load_engine
from glassloop.saved import state as snapshots


@dataclass(frozen=True)
class StartState:
    """The state before an update: adapters, optimizer, random numbers by rank."""

    flat: Tensor  # (N,) fp32 on the CPU
    moments: tuple[dict[str, Tensor], Any]  # optimizer state, see snapshots.optimizer_state
    rng_states: tuple[dict[str, Any], ...]  # by rank, before its passes
    loss_scale: float


@dataclass(frozen=True)
class Parts:
    """A replica with the config and accelerator that built it."""

    config: Config
    accelerator: Accelerator
    replica: Replica


def make_parts(
    config: Config,
    accelerator: Accelerator | None,
    *,
    pad_id: int,
    rows: Sequence[Row],
    rank: int = 0,
) -> Parts:
    """Build the replica that the run had, on this process's device.

    Args:
        accelerator: of earlier parts, which are no longer used; None makes one. fp32 needs none, so
            that a bf16 run's can be varied.
        rows: those to be computed, whose token ids the base must know.
        rank: whose random numbers the parts leave behind, as in build_run.

    Raises:
        ValueError: the base does not know a token id of the rows.
    """
    execution = config.execution.model_copy(update={"reduction": "explicit"})
    config = config.model_copy(update={"execution": execution})
    if accelerator is None:
        accelerator = make_accelerator(config)
    else:
        accelerator.free_memory()  # it holds on to the engines that it prepared
    device = device_of(accelerator)
    engine = load_engine(config, device, rank=rank, first=contextlib.nullcontext)
    embedding: Any = engine.hf.get_base_model().get_input_embeddings()  # type: ignore[operator, union-attr]
    tokens = getattr(embedding, "token_adapter", None)  # PEFT's, around tokens that train
    largest = (embedding if tokens is None else tokens.base_layer).num_embeddings
    if odd := [row for row in rows if max(row.input_ids) >= largest]:
        raise ValueError(
            f"model.id = {config.model.id} knows token ids below {largest}, row "
            f"{odd[0].row_id} has "
            f"{max(odd[0].input_ids)}: name the base that the update was made on with --base"
        )
    replica = build_replica(
        config,
        accelerator,
        engine,
        adapters_of(engine),
        device=device,
        rank=0,
        ranks=1,
        pad_id=pad_id,
    )
    return Parts(config, accelerator, replica)


def state_of(parts: Parts, rng_states: Sequence[dict[str, Any]]) -> StartState:
    """A copy of what the parts hold now."""
    replica = parts.replica
    flat = replica.adapters.flat
    moments = snapshots.optimizer_state(replica.optimizer, flat)
    return StartState(flat.detach().cpu().clone(), moments, tuple(rng_states), replica.scale.value)
