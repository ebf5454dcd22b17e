"""A decoder layer of the PEFT model, its weights stacked into groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glassloop.base.packed import Packed
from glassloop.engines.fused.dequant import pack
from glassloop.engines.fused.layer import Layer
from glassloop.engines.fused.linear import Adapter, Linear
from glassloop.engines.fused.supported import GROUPS


def build_layer(
    module: Any,
    config: Any,
    dtype: torch.dtype,
    index: int,
    stacked: dict[str, Packed] | None = None,
) -> Layer:
    """Stack the weights of one decoder layer into groups.

    `stacked`: they are stacked already.
    """
    groups = {}
    for group, names in GROUPS.items():
        found = [module.get_submodule(name) for name in names]
        if stacked is None:
            plain = [getattr(one, "base_layer", one) for one in found]
            packed = pack(plain, [f"layer {index} {name}" for name in names])
        else:
            packed = stacked[group]
        groups[group] = Linear(
            group, packed, tuple(_adapter(one) for one in found), dtype, _bias(found)
        )
    return Layer(
        **groups,
        norm_in=module.input_layernorm.weight,
        norm_mid=module.post_attention_layernorm.weight,
        eps=config.rms_norm_eps,
        heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        head_size=module.self_attn.head_dim,
    )


def _bias(modules: list[Any]) -> Tensor | None:
    """Biases of all modules, 0 for those without one; None without any."""
    layers = [getattr(one, "base_layer", one) for one in modules]
    if all(one.bias is None for one in layers):
        return None
    return torch.cat(
        [
            one.weight.new_zeros(one.out_features, dtype=torch.float32)
            if one.bias is None
            else one.bias.data
            for one in layers
        ]
    )


def _adapter(module: Any) -> Adapter | None:
    if not hasattr(module, "lora_A"):
        return None
    name = module.active_adapters[0]
    return Adapter(
        module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name])
    )
