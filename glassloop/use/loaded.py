"""A trained adapter in its base, on one device, ready to answer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from glassloop.base.reading import DTYPES
from glassloop.data.templates import Template
from glassloop.engines.build import build_engine
from glassloop.engines.peft import PeftEngine
from glassloop.formula.optim import FlatAdapters
from glassloop.loop.generation import EvaluationSetup
from glassloop.saved.state import flat_from
from glassloop.use.trained import Trained, adapter_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Loaded:
    """The model with its adapter on one device, ready to answer."""

    engine: PeftEngine
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]
    precision: str  # bf16 | fp16 | fp32: what products are computed in here
    notes: tuple[str, ...]

    @property
    def hf(self) -> Any:
        return self.engine.hf


def setup_of(
    loaded: Loaded,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    max_new_tokens: int,
) -> EvaluationSetup:
    """Describe how the loaded model measures and answers, on one rank.

    Answers end with the template's stop tokens alone.
    """
    return EvaluationSetup(
        template=template,
        tokenizer=tokenizer,
        stop_ids=tuple(template.stop_ids),
        pad_id=tokenizer.pad_token_id,  # type: ignore[arg-type]
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        device=loaded.device,
        autocast=loaded.autocast,
    )


def load(
    trained: Trained,
    device: torch.device,
    *,
    first: Callable[[], AbstractContextManager[Any]] = nullcontext,
    precision: str | None = None,
) -> Loaded:
    """Load the run's base, checked by content, with the checkpoint's adapter.

    The engine is the reference.

    Args:
        first: context in which one rank of a host goes before the others.
        precision: bf16 | fp16 | fp32 instead of the run's own.

    Raises:
        ValueError: the base differs from the one trained on, or weights do not fit.
    """
    config, notes = trained.config, []
    precision = precision or config.execution.precision
    if precision == "fp16" and device.type == "cpu":
        precision = "fp32"
        notes.append("the run computed in fp16, which a CPU has not: fp32 here")
    if config.execution.engine != "peft":
        notes.append(
            f"trained by engine {config.execution.engine}; answers and numbers here are the "
            "reference engine's"
        )
    model = config.model.model_copy(update={"init_adapter": None})
    shared: dict[str, Any] = dict(
        precision=precision, checkpointing=False, seed=config.seed, device=device, first=first
    )
    over_file = config.execution.engine == "fused" and device.type == "cuda"
    spare = int(spare_gib(device) * 2**30) if over_file else None
    engine = build_engine(model, config.lora, **shared, spare_bytes=spare)
    assert isinstance(engine, PeftEngine)
    check_base(trained, engine.report.base_hash)
    put_adapter(trained, engine)
    engine.eval()
    dtype = DTYPES[precision]
    autocast = (
        nullcontext if precision == "fp32" else partial(torch.autocast, device.type, dtype=dtype)
    )
    return Loaded(engine, device, autocast, precision, (*engine.report.notes, *notes))


def spare_gib(device: torch.device) -> float:
    """GiB of a GPU that answers need beside the base.

    For caches, logits and dequantised weights.
    """
    return max(2.0, 0.15 * torch.cuda.get_device_properties(device).total_memory / 2**30)


def check_base(trained: Trained, base_hash: str) -> None:
    """Raise ValueError unless the base's files are those of training."""
    if base_hash != trained.state.base_hash:
        raise ValueError(
            f"model.id = {trained.config.model.id} has changed, or is another base: "
            f"{trained.checkpoint} was trained on {trained.state.base_hash[:16]}, this is "
            f"{base_hash[:16]}; name the base of training with --model"
        )


def put_adapter(trained: Trained, engine: PeftEngine) -> None:
    """Give an engine's adapters the checkpoint's values."""
    adapters, weights = FlatAdapters(engine.hf.named_parameters()), adapter_weights(trained)
    try:
        flat = flat_from(weights, adapters)
    except ValueError as error:
        raise ValueError(
            f"checkpoint {trained.checkpoint} does not fit this base: {error}"
        ) from error
    with torch.no_grad():
        adapters.flat.copy_(flat)


def device_here(index: int = 0) -> torch.device:
    """Choose this process's GPU, or the CPU for want of one."""
    from glassloop.loop.launch import on_cuda

    return torch.device("cuda", index) if on_cuda() else torch.device("cpu")
