"""What holds for a whole run: as its config plans it, and as it is found once everything is built. The contract compares the two."""

from __future__ import annotations

import socket
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from transformers.pytorch_utils import Conv1D

from glassloop.base.checks import dtype_audit
from glassloop.config.config import Config
from glassloop.formula.dist import gather_objects
from glassloop.formula.optim import FlatAdapters
from glassloop.loop.launch import MIXED_PRECISION

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
STORED = {"nf4": "uint8"}  # quantised weights lie in bytes


def planned_facts(
    config: Config, *, ranks: int, linear_shapes: list[tuple[int, int]], on_cuda: bool
) -> dict[str, Any]:
    """What the config asks for. linear_shapes: (in, out) of every linear layer that gets an adapter."""
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
        "attention": config.model.attention
        if execution.engine == "peft"
        else execution.engine,  # other engines bring their own
        "trainable parameters": sum(
            config.lora.r * (inputs + outputs) for inputs, outputs in linear_shapes
        ),
        "dtype of adapters": "float32",
        "dtype of quantised weights": STORED.get(config.model.quantization),
        "dtype of embedding and head": dtype,
        "deterministic": execution.deterministic,
    }


def found_facts(
    accelerator: Accelerator,
    engine: nn.Module,
    prepared: nn.Module,
    adapters: FlatAdapters,
    *,
    device: torch.device,
    shared: bool,
) -> dict[str, Any]:
    """The same names, counted. All ranks take part. `prepared`: what the loop calls. shared: ranks may share a card."""
    groups = dtype_audit(engine.hf)  # type: ignore[arg-type]
    places = gather_objects(f"{socket.gethostname()} {device}")

    def dtypes(*kinds: str) -> str | None:
        found = sorted({group.dtype for group in groups if group.kind in kinds})
        return ", ".join(found) or None

    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return {
        "processes": ranks,
        "devices": 1 if device.type != "cuda" else "shared" if shared else len(set(places)),
        "collectives": dist.get_backend().split(":")[-1] if ranks > 1 else None,
        "mixed precision": accelerator.mixed_precision,
        "compiler of the launcher": accelerator.state.dynamo_plugin.backend.value,  # type: ignore[union-attr]
        "gradients reduced by": "ddp"
        if isinstance(prepared, nn.parallel.DistributedDataParallel)
        else "the loop",
        "engine": engine.name,  # type: ignore[union-attr]
        "attention": engine.attention,  # type: ignore[union-attr]
        "trainable parameters": adapters.trainable,
        "dtype of adapters": dtypes("adapter A", "adapter B"),
        "dtype of quantised weights": dtypes("quantised linear"),
        "dtype of embedding and head": dtypes("embedding", "head"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def target_shapes(hf: nn.Module, targets: tuple[str, ...]) -> list[tuple[int, int]]:
    """(in, out) of every linear layer of the base whose name ends in a target: what should have an adapter, whatever has one."""
    shapes = {}
    for name, module in hf.named_modules():
        path = name.removesuffix(".base_layer")
        if path.rpartition(".")[2] in targets:
            if hasattr(module, "in_features"):
                shapes[path] = (module.in_features, module.out_features)
            elif isinstance(module, Conv1D):
                shapes[path] = (module.nx, module.nf)
    return list(shapes.values())
