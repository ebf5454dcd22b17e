"""Refusals by name of models that the fused engine does not support."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from glassloop.plan.described import Described
from glassloop.plan.families import Unsupported
from glassloop.plan.support import check_fields, description_of, fields_of

CURE = "set execution.engine=peft"


def describe_supported(config: Any, base: nn.Module, dtype: torch.dtype) -> Described:
    """Describe a model.

    Raises ValueError naming the first field or module that is not supported.

    Args:
        config: the model's config. base: the causal language model, adapters attached. dtype:
            of its 16- or 32-bit weights.
    """
    values, text = fields_of(config), config.get_text_config()
    try:
        found = description_of(values)
        check_fields(fields_of(text), declared(text))
    except Unsupported as error:
        raise ValueError(f"execution.engine = fused: {error}: {CURE}") from error
    if type(base).__module__.startswith("transformers_modules"):
        raise ValueError(
            "execution.engine = fused: the model brings Python code of its own, which it would "
            f"not run: {CURE}"
        )
    if dtype == torch.float16:
        raise ValueError(
            "execution.engine = fused has no fp16 backward pass: set execution.precision=bf16, or "
            "execution.engine=peft"
        )
    for index, layer in enumerate(base.get_decoder().layers):  # type: ignore[union-attr, arg-type]
        for names in found.groups.values():
            for name in names:
                check_adapter(f"layer {index} {name}", layer.get_submodule(name))
    head = base.get_output_embeddings()  # type: ignore[operator]
    if getattr(head, "bias", None) is not None:
        raise ValueError(f"execution.engine = fused: the head has a bias: {CURE}")
    return found


def declared(config: Any) -> frozenset[str]:
    """Fields that a config's class in transformers declares.

    None before transformers 5.
    """
    if not dataclasses.is_dataclass(config):
        return frozenset()
    return frozenset(field.name for field in dataclasses.fields(config))


def check_adapter(name: str, module: nn.Module) -> None:
    """Raise ValueError unless `module` has at most one plain LoRA adapter."""
    if not hasattr(module, "lora_A"):
        return
    active = list(module.active_adapters)  # type: ignore[arg-type]
    if len(active) != 1 or module.merged:
        raise ValueError(
            f"execution.engine = fused: {name} has adapters {active}, merged: {module.merged}; it "
            f"knows a single one, apart: {CURE}"
        )
    dropout = module.lora_dropout[active[0]]  # type: ignore[index]
    if not isinstance(dropout, nn.Identity):
        raise ValueError(
            f"execution.engine = fused: lora.dropout = {getattr(dropout, 'p', dropout)} is not "
            f"supported: set it to 0, or {CURE}"
        )
    if module.lora_B[active[0]].bias is not None or getattr(module, "use_dora", {}).get(active[0]):  # type: ignore[index, union-attr]
        raise ValueError(
            f"execution.engine = fused: {name} has an adapter with a bias, or DoRA: {CURE}"
        )
