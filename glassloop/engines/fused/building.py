"""A decoder layer of the PEFT model, its weights stacked into groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glassloop.base.packed import Packed
from glassloop.engines.fused.dequant import pack
from glassloop.engines.fused.linear import Adapter, Linear
from glassloop.engines.fused.parts import Layer
from glassloop.plan.described import Described


def build_layer(
    module: Any,
    of: Described,
    dtype: torch.dtype,
    index: int,
    stacked: dict[str, Packed] | None = None,
) -> Layer:
    """Stack the weights of one decoder layer into groups.

    `stacked`: they are stacked already. Raises ValueError naming a layer that is not in NF4.
    """
    groups = {}
    for group, names in of.groups.items():
        found = [module.get_submodule(name) for name in names]
        if stacked is None:
            plain = [getattr(one, "base_layer", one) for one in found]
            packed = pack(plain, [f"layer {index} {name}" for name in names])
        else:
            packed = stacked[group]
        groups[group] = Linear(
            group, packed, tuple(_adapter(one) for one in found), dtype, _bias(found)
        )
    norms, attention = of.norms, module.self_attn
    norm_qk = None
    if of.head_norms:
        norm_qk = tuple(multiplier(one.weight, of) for one in (attention.q_norm, attention.k_norm))
    return Layer(
        **groups,
        norm_in=_norm(module, norms.before_attention, of),
        norm_after_o=_norm(module, norms.after_attention, of),
        norm_mid=_norm(module, norms.before_mlp, of),
        norm_after_down=_norm(module, norms.after_mlp, of),
        norm_qk=norm_qk,  # type: ignore[arg-type]
        of=of,
        kind=of.kinds[index],
    )


def multiplier(weight: Tensor, of: Described) -> Tensor:
    """What a norm multiplies by, the added one included."""
    return 1 + weight.detach().float() if of.added_one else weight


def _norm(module: Any, name: str | None, of: Described) -> Tensor | None:
    return None if name is None else multiplier(module.get_submodule(name).weight, of)


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
