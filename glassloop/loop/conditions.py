"""Conditions of a whole run, as planned and as found.

The contract compares the two.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from transformers.pytorch_utils import Conv1D

from glassloop.base.checks import check_token_ids, dtype_audit
from glassloop.base.experts import named_by
from glassloop.base.reading import attention_for
from glassloop.config import Config, EvaluationConfig, LoraConfig
from glassloop.data.batches import Batches
from glassloop.data.dataset import Dataset
from glassloop.data.stored import rows_with
from glassloop.formula.dist import gather_objects
from glassloop.loop.launch import MIXED_PRECISION
from glassloop.loop.replica import Replica, card_name
from glassloop.plan.contract import Contract

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
STORED = {"nf4": "uint8"}  # quantised weights lie in bytes


def check_rows(config: Config, dataset: Dataset, tokenizer: Any, size: int) -> None:
    """Raise ValueError for a token id that the base does not have.

    Args:
        size: rows of the base's embedding.
    """
    sides = (dataset.train.rows, dataset.heldout.rows)
    ids = ((row.row_id, row.input_ids) for rows in sides for row in rows_with(rows, size))
    check_token_ids(ids, {"pad": tokenizer.pad_token_id}, size, tokenizer, config.model.id)


def planned_facts(
    config: Config,
    *,
    ranks: int,
    linear_shapes: Mapping[str, tuple[int, int]],
    base: Any,
    on_cuda: bool,
) -> dict[str, Any]:
    """The facts that the config asks for.

    Args:
        linear_shapes: (in, out) of every linear layer that gets an adapter, by its name.
        base: the base's own config, of transformers.
    """
    execution = config.execution
    dtype = DTYPES[execution.precision]
    shared = on_cuda and execution.backend == "gloo"  # ranks may share a card then
    return {
        "processes": ranks,
        "devices": 1 if not on_cuda else "shared" if shared else ranks,
        "collectives": None
        if ranks == 1
        else execution.backend
        if execution.backend != "auto"
        else "nccl"
        if on_cuda
        else "gloo",
        "mixed precision": MIXED_PRECISION[execution.precision],
        "compiler of the launcher": "NO",
        "gradients reduced by": "ddp" if execution.reduction == "ddp" and ranks > 1 else "the loop",
        "engine": execution.engine,
        "attention": attention_for(config.model.attention, base)
        if execution.engine == "peft"
        else execution.engine,  # other engines bring their own
        "trainable parameters": len(config.lora.trainable_token_indices)
        * base.get_text_config().hidden_size
        + sum(
            config.lora.rank_of(name) * (inputs + outputs)
            for name, (inputs, outputs) in linear_shapes.items()
        ),
        "dtype of adapters": "float32",
        "dtype of quantised weights": STORED.get(config.model.quantization),
        "dtype of embedding and head": dtype,
        "deterministic": execution.deterministic,
    }


def found_facts(accelerator: Accelerator, replica: Replica, *, shared: bool) -> dict[str, Any]:
    """The same names, counted. All ranks take part.

    Args:
        shared: ranks may share a card.
    """
    engine, device = replica.plain_engine, replica.device
    groups = dtype_audit(engine.hf)
    places = gather_objects(f"{socket.gethostname()} {card_name(device)}")

    def dtypes(*kinds: str) -> str | None:
        found = sorted({group.dtype for group in groups if group.kind in kinds})
        return ", ".join(found) or None

    ranks = dist.get_world_size() if dist.is_initialized() else 1
    wrapped = isinstance(replica.engine, nn.parallel.DistributedDataParallel)
    return {
        "processes": ranks,
        "devices": 1 if device.type != "cuda" else "shared" if shared else len(set(places)),
        "collectives": dist.get_backend().split(":")[-1] if ranks > 1 else None,
        "mixed precision": accelerator.mixed_precision,
        "compiler of the launcher": accelerator.state.dynamo_plugin.backend.value,  # type: ignore[union-attr]
        "gradients reduced by": "ddp" if wrapped else "the loop",
        "engine": engine.name,
        "attention": engine.attention,
        "trainable parameters": replica.adapters.trainable,
        "dtype of adapters": dtypes("adapter A", "adapter B", "trained embedding"),
        "dtype of quantised weights": dtypes("quantised linear"),
        "dtype of embedding and head": dtypes("embedding", "head"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def contract_of(
    batches: Batches,
    rows_digest: str,
    facts: dict[str, Any],
    evaluation: EvaluationConfig,
) -> Contract:
    """The run's contract, update by update."""
    patience, every = evaluation.patience, evaluation.every_updates
    early = None if patience is None else {"patience": patience, "every_updates": every or 0}
    rows = [batches.rows_of(update) for update in range(1, batches.plan.updates + 1)]
    return Contract(
        step=batches.plan,
        rows=tuple(map(len, rows)),
        supervised_tokens=tuple(sum(batches.labels[row] for row in one) for one in rows),
        real_tokens=tuple(sum(batches.lengths[row] for row in one) for one in rows),
        rows_digest=rows_digest,
        facts=facts,
        pass_tokens=batches.pass_tokens if batches.packed else None,
        ends_early=early,
    )


def target_shapes(hf: nn.Module, lora: LoraConfig) -> dict[str, tuple[int, int]]:
    """(in, out) by name of linear layers that should have an adapter.

    Their names end in a target, whatever has an adapter now.
    """
    shapes = {}
    for name, module in hf.named_modules():
        path = name.removesuffix(".base_layer").removeprefix("base_model.model.")
        if path.rpartition(".")[2] in lora.targets:
            if hasattr(module, "in_features"):
                shapes[path] = (module.in_features, module.out_features)
            elif isinstance(module, Conv1D):
                shapes[path] = (module.nx, module.nf)
    for name, parameter in hf.named_parameters():
        path = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if named_by(path, lora.target_parameters):
            *experts, inputs, outputs = parameter.shape  # every expert has its own A and B
            shapes[path] = (inputs * math.prod(experts), outputs * math.prod(experts))
    return shapes
