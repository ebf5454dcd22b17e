"""Builds an engine from a config: base, adapters, checks."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from glassloop.base.checks import (
    check_devices,
    check_dtypes,
    check_plain_head,
    check_unpatched,
    unquantised_note,
)
from glassloop.base.dropped import free_dropped
from glassloop.base.experts import quantise_experts
from glassloop.base.host_pages import HostPages
from glassloop.base.layer_file import NotStreamable
from glassloop.base.quantised import LoadReport, load_base
from glassloop.base.reading import DTYPES
from glassloop.base.sharded import share_layers
from glassloop.base.source import BaseSource
from glassloop.base.still import check_still, silence
from glassloop.base.streamed import load_streamed
from glassloop.base.tokenizer import load_tokenizer
from glassloop.config import LoraConfig, ModelConfig
from glassloop.engines.adapters import attach_lora, reach_note
from glassloop.engines.init_adapter import load_adapter
from glassloop.engines.norms import fuse_norms
from glassloop.engines.peft import PeftEngine, recompute_layers
from glassloop.formula.dist import gather_objects, is_distributed
from glassloop.plan.families import Unsupported
from glassloop.plan.support import groups_of

if TYPE_CHECKING:
    from glassloop.engines.fused.engine import FusedEngine
    from glassloop.engines.fused.rehearsal import Rehearsal

Engine = Union[PeftEngine, "FusedEngine"]  # what the loop calls: the same forward, hf and report


def build_engine(
    model: ModelConfig,
    lora: LoraConfig,
    *,
    precision: str,
    checkpointing: bool,
    seed: int,
    device: torch.device,
    first: Callable[[], AbstractContextManager[Any]],
    engine: str = "peft",
    longest_row: int | None = None,
    memory_base: str | int = "auto",
    spare_bytes: int | None = None,
    source: BaseSource | None = None,
) -> Engine:
    """Load the base onto `device`, attach fp32 adapters, check both.

    Returns the engine in training mode.

    Args:
        precision: bf16 | fp16 | fp32, of the base and its matrix products. Autocast is the
            caller's.
        checkpointing: recompute each decoder layer in the backward pass.
        seed: of the fresh adapters' A matrices; equal on all ranks, so that their adapters are.
        first: context in which one rank of a host goes before the others, to download and quantise.
        engine: peft | fused | unsloth.
        longest_row: tokens, for unsloth; None: as many as the model has positions.
        memory_base: memory.base, for fused.
        spare_bytes: for peft without training, over a base that may outgrow the device: what
            stays free there while as many layers as fit are brought. None: all are.
        source: of the base, where the caller has resolved it.

    Raises:
        ValueError: a model, target, adapter folder or launch cannot train as asked; names the
            field and the cure.
    """
    assert engine in ("peft", "fused", "unsloth"), engine
    shared: dict[str, Any] = dict(precision=precision, device=device, first=first, source=source)
    only_on_cpu: tuple[str, ...] = ()
    pages = None
    if engine == "unsloth":
        from glassloop.engines import unsloth

        hf, report = unsloth.load_with_unsloth(
            model,
            lora,
            load_tokenizer(model, source),
            checkpointing=checkpointing,
            seed=seed,
            longest_row=longest_row,
            **shared,
        )
        only_on_cpu = unsloth.ON_CPU
    else:
        beside = _rehearsal(model, lora, precision, device, source) if engine == "fused" else None
        base, report, pages = _load(model, engine, memory_base, spare_bytes, shared)
        check_unpatched(base, engine)
        check_plain_head(base, device, report.name)
        report = prepared(base, report, model, device, keep=lora.target_parameters)
        fuse_norms(base)
        head = base.get_output_embeddings()  # before PEFT may wrap it
        hf = attach_lora(base, lora, seed=seed, base_name=report.name, commit=report.commit)
        reach = reach_note(hf, head)
        compiling = beside.end() if beside is not None else ""
        report = replace(report, notes=(*report.notes, *filter(None, [reach, compiling])))
        if checkpointing and engine == "peft":
            recompute_layers(base, model.id)
    if model.init_adapter is not None:
        load_adapter(hf, model.init_adapter, lora, base_name=report.name, commit=report.commit)  # type: ignore[arg-type]
    check_devices(hf, device, but=only_on_cpu)
    check_dtypes(hf, precision)
    if engine == "fused":
        return _fused_engine(hf, report, checkpointing, pages).train()
    return (PeftEngine(hf, report) if engine == "peft" else _unsloth_engine(hf, report)).train()


def prepared(
    base: PreTrainedModel,
    report: LoadReport,
    model: ModelConfig,
    device: torch.device,
    *,
    keep: Sequence[str] = (),
) -> LoadReport:
    """Put experts into NF4 and turn off the base's own dropout.

    Returns the report with notes. `keep`: lora.target_parameters, which stay in 16 bits.
    """
    if model.quantization == "nf4":
        quantise_experts(base, double=model.double_quantization, keep=keep)
    quietened = silence(base)
    check_still(base, device, report.name)
    left = unquantised_note(base) if model.quantization == "nf4" else ""
    return replace(report, notes=(*report.notes, *filter(None, (quietened, left))))


def _load(
    model: ModelConfig,
    engine: str,
    memory_base: str | int,
    spare_bytes: int | None,
    shared: dict[str, Any],
) -> tuple[PreTrainedModel, LoadReport, HostPages | None]:
    """Load the base.

    For fused, or within `spare_bytes`, it lies over a file of layers if its weights have that form.
    """
    over_file = engine == "fused" or spare_bytes is not None
    if not over_file or model.quantization != "nf4":
        return *load_base(model, **shared), None
    locking = {"gpu": "no", "auto": "try"}.get(str(memory_base), "must")
    try:
        hf, report, pages = load_streamed(
            model,
            groups_of,
            **shared,  # type: ignore[arg-type]
            locking=locking,  # type: ignore[arg-type]
            spare_bytes=spare_bytes,
        )
        if memory_base == "sharded":
            rank = torch.distributed.get_rank() if is_distributed() else 0
            share_layers(pages, rank, gather_objects)
            report = replace(report, notes=(*report.notes, pages.notes[-1]))
        return hf, report, pages
    except Unsupported as error:
        raise ValueError(f"execution.engine = fused: {error}: set execution.engine=peft") from error
    except NotStreamable as error:
        if locking == "must":
            raise ValueError(
                f"memory.base = {memory_base}: the base cannot stream ({error}): set it to gpu"
            ) from error
    # Here the error is gone, and with it what the try had brought to the card.
    free_dropped(shared["device"])
    return *load_base(model, **shared), None


def _rehearsal(
    model: ModelConfig,
    lora: LoraConfig,
    precision: str,
    device: torch.device,
    source: BaseSource | None,
) -> Rehearsal | None:
    """Begin to compile the fused engine's kernels, where they are needed.

    None for a model that `fused` does not support: what loads it says why.
    """
    if device.type != "cuda" or source is None or importlib.util.find_spec("triton") is None:
        return None
    from glassloop.engines.fused.rehearsal import Quantised, Rehearsal, shapes

    try:
        config = AutoConfig.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=False
        )
        engine = shapes(config, lora, DTYPES[precision], Quantised(model.double_quantization))
    except ValueError:
        return None
    return Rehearsal(engine, device)


def _fused_engine(
    hf: nn.Module, report: LoadReport, checkpointing: bool, pages: HostPages | None
) -> FusedEngine:
    """The fused engine over the same storage.

    It recomputes all layers until loop/memory.py chooses.
    """
    try:
        from glassloop.engines.fused.engine import FusedEngine
    except ImportError as error:
        raise ValueError(
            f"execution.engine = fused needs triton, which cannot be imported here ({error}): "
            "pip install triton, or set execution.engine=peft"
        ) from error
    return FusedEngine(hf, report, keep=not checkpointing, pages=pages)


def _unsloth_engine(hf: nn.Module, report: LoadReport) -> PeftEngine:
    """Unsloth's decoder under the reference's loss."""
    from glassloop.engines import unsloth

    return PeftEngine(
        hf,
        report,
        name="unsloth",
        packed_bounds=unsloth.packed_bounds,
        before_training_pass=unsloth.train_again,
    )
