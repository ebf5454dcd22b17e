"""One rank's replica: engine, adapters, optimizer and loss scale.

A run and a replay build it by the same functions. All ranks of a run hold equal adapters and
optimizer states.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import set_seed

from glassloop.base.source import BaseSource
from glassloop.config import Config
from glassloop.engines.build import Engine, build_engine
from glassloop.formula.dist import broadcast_from_rank_0, first_difference, gather_objects
from glassloop.formula.optim import FlatAdapters, LossScale, bit_sum, make_optimizer
from glassloop.saved.state import restore_rng, rng_state

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Remembered:
    """Random numbers and loss scale as they were before an update."""

    rng: dict[str, Any]
    loss_scale: float
    finite_updates: int


class ReplicasDiffer(RuntimeError):
    """Raised on every rank if their adapters or optimizer states differ."""


class SharedPassFailed(RuntimeError):
    """Raised where a rank cannot finish a pass that ranks share."""


@dataclass
class Replica:
    """The parts that one rank computes updates with."""

    engine: Any  # what the loop calls: forward(Pass) -> (loss_sum, row_loss_sums)
    plain_engine: Any  # the same without DDP's wrapper
    adapters: FlatAdapters
    optimizer: torch.optim.Optimizer
    scale: LossScale
    device: torch.device
    rank: int
    ranks: int
    pad_id: int
    ddp: bool  # DistributedDataParallel reduces gradients, inside backward
    before: Remembered = field(init=False)  # of the update in progress

    def remember(self) -> None:
        """Note random numbers and loss scale before an update."""
        scale = self.scale
        self.before = Remembered(rng_state(self.device), scale.value, scale.finite_updates)

    def put_back(self) -> None:
        """Restore what `remember` noted: the update was not applied."""
        before = self.before
        self.scale.value, self.scale.finite_updates = before.loss_scale, before.finite_updates
        restore_rng(before.rng, self.device)

    def require_agreement(self, update: int) -> None:
        """Compare the ranks after `update` updates. Raises ReplicasDiffer on all of them."""
        if len(set(gather_objects(int(self.adapters.checksum(self.optimizer))))) > 1:
            raise ReplicasDiffer(self.disagreement(f"after update {update}"))

    def disagreement(self, when: str) -> str:
        """Say where the ranks differ. All ranks take part."""
        parts = self.adapters.parts(self.optimizer)
        where = first_difference(parts, torch.stack([bit_sum(tensor) for _, tensor in parts]))
        return (
            f"the ranks' adapters or optimizer states are no longer equal {when}: {where}. "
            "Something changed or skipped a step on one rank only; nothing was saved. "
            "Resume from the last checkpoint, and report this message if it comes again"
        )


def device_of(accelerator: Accelerator) -> torch.device:
    """The rank's device.

    Accelerate numbers CPUs, and a card not always; tensors want the reverse.
    """
    device = accelerator.device
    if device.type != "cuda":
        return torch.device("cpu")
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())


def card_name(device: torch.device) -> str:
    """A name that no other card of the host has.

    Numbers differ: a launcher may show each rank one card, which is card 0 to all of them.
    """
    if device.type != "cuda":
        return str(device)
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return str(device) if uuid is None else str(uuid)


def load_engine(
    config: Config,
    device: torch.device,
    *,
    rank: int,
    first: Callable[[], AbstractContextManager[Any]],
    source: BaseSource | None = None,
) -> Engine:
    """Build the config's engine with fresh adapters.

    Seeds the rank's generators first: dropout differs by rank, adapters and row order have seeds of
    their own.

    Args:
        first: context in which one rank of a host runs before the others (it downloads and caches).
        source: of the base, where the caller has located it.
    """
    set_seed(config.seed + rank)
    return build_engine(
        config.model,
        config.lora,
        precision=config.execution.precision,
        checkpointing=config.execution.checkpointing,
        seed=config.seed,
        device=device,
        first=first,
        source=source,
        engine=config.execution.engine,
        longest_row=config.data.max_tokens,
        memory_base=config.memory.base,
    )


def adapters_of(engine: Engine) -> FlatAdapters:
    """The engine's adapters in one buffer, with rank 0's values.

    All ranks take part.
    """
    adapters = FlatAdapters(engine.hf.named_parameters())
    broadcast_from_rank_0(adapters.flat.data)
    return adapters


def build_replica(
    config: Config,
    accelerator: Accelerator,
    engine: Engine,
    adapters: FlatAdapters,
    *,
    device: torch.device,
    rank: int,
    ranks: int,
    pad_id: int,
) -> Replica:
    """Build optimizer and loss scale around an engine, and prepare the engine.

    With fp32 and explicit reduction the engine needs no preparation: a
    replay can then compute in fp32 under an accelerator that was made for bf16.
    """
    execution, stability = config.execution, config.stability
    ddp = execution.reduction == "ddp" and ranks > 1
    prepared: Any = engine
    if ddp or execution.precision != "fp32":  # evaluation_mode: autocast, but no wrapper
        prepared = accelerator.prepare_model(
            engine, device_placement=False, evaluation_mode=not ddp
        )
    return Replica(
        engine=prepared,
        plain_engine=engine,
        adapters=adapters,
        optimizer=optimizer_of(config, adapters),
        scale=LossScale(
            stability.initial_loss_scale,
            stability.loss_scale_growth_updates,
            enabled=execution.precision == "fp16",
        ),
        device=device,
        rank=rank,
        ranks=ranks,
        pad_id=pad_id,
        ddp=ddp,
    )


def optimizer_of(config: Config, adapters: FlatAdapters) -> torch.optim.Optimizer:
    """The configured optimizer over the flat buffer."""
    asked = config.optimizer
    return make_optimizer(
        asked.name,
        adapters.flat,
        lr=asked.lr,
        beta1=asked.beta1,
        beta2=asked.beta2,
        eps=asked.eps,
        weight_decay=asked.weight_decay,
        b_lr_ratio=asked.b_lr_ratio,
    )
