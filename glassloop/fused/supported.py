"""What the fused engine honours of a model's config. Anything else that would change a number is refused by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

CURE = "set execution.engine=peft"
# Fields of a Llama config that change a number, with the values that are carried out. Sizes are read from the weights themselves.
HONOURED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama", "qwen2"),
    "hidden_act": ("silu",),
    "attention_dropout": (0, 0.0, None),
    "pretraining_tp": (1, None),
    "sliding_window": (None,),
    "partial_rotary_factor": (1, 1.0, None),
}
ROTARY = ("default", "linear", "llama3")  # frequencies that do not depend on a row's length
GROUPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def check_supported(config: Any, base: nn.Module, dtype: torch.dtype) -> None:
    """Raise ValueError naming the first field or module that the fused engine would not carry out as transformers does.

    Args:
        config: the model's config. base: the causal language model, adapters attached. dtype: of its 16- or 32-bit weights.
    """
    for name, values in HONOURED.items():
        value = getattr(config, name, None)
        if value not in values:
            raise ValueError(
                f"execution.engine = fused: the model's config has {name} = {value!r}, it knows {_names(values)}: {CURE}"
            )
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if kind not in ROTARY:
        raise ValueError(
            f"execution.engine = fused: the model's config has rope_type = {kind!r}, it knows {_names(ROTARY)}: {CURE}"
        )
    if dtype == torch.float16:
        raise ValueError(
            "execution.engine = fused has no fp16 backward pass: set execution.precision=bf16, or execution.engine=peft"
        )
    for index, layer in enumerate(base.model.layers):  # type: ignore[union-attr, arg-type]
        for names in GROUPS.values():
            for name in names:
                check_adapter(f"layer {index} {name}", layer.get_submodule(name))
    head = base.get_output_embeddings()  # type: ignore[operator]
    if getattr(head, "bias", None) is not None:
        raise ValueError(f"execution.engine = fused: the head has a bias: {CURE}")


def check_adapter(name: str, module: nn.Module) -> None:
    """Raise ValueError unless `module` is a plain linear layer, or one with a single plain LoRA adapter."""
    if not hasattr(module, "lora_A"):
        return
    active = list(module.active_adapters)  # type: ignore[arg-type]
    if len(active) != 1 or module.merged:
        raise ValueError(
            f"execution.engine = fused: {name} has adapters {active}, merged: {module.merged}; it knows a single one, apart: {CURE}"
        )
    dropout = module.lora_dropout[active[0]]  # type: ignore[index]
    if not isinstance(dropout, nn.Identity):
        raise ValueError(
            f"execution.engine = fused: lora.dropout = {getattr(dropout, 'p', dropout)} is not carried out: set it to 0, or {CURE}"
        )
    if module.lora_B[active[0]].bias is not None or getattr(module, "use_dora", {}).get(active[0]):  # type: ignore[index, union-attr]
        raise ValueError(f"execution.engine = fused: {name} has an adapter with a bias, or DoRA: {CURE}")


def _names(values: tuple[Any, ...]) -> str:
    return ", ".join(map(repr, values))
