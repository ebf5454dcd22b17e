"""Experts that lie in one tensor a layer, in NF4.

transformers quantises linear layers alone. bitsandbytes quantises any parameter and dequantises it
as a layer reads it, through torch's parametrizations.

Legend: E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

BLOCK = 64  # weights that share a scale, as linear layers have them


def expert_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield (whole name, module, its name there, parameter) of experts' weights.

    They are (E, ..., ...), or bytes with a `quant_state` of that shape.
    """
    for path, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList) or "experts" not in path.split("."):
            continue
        inner = getattr(module, "parametrizations", {})
        found = {name: one.original for name, one in inner.items()}
        for name, one in [*module.named_parameters(recurse=False), *found.items()]:
            if len(shape_of(one)) == 3:
                yield f"{path}.{name}", module, name, one


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """Shape of the weights that a parameter stands for."""
    state = getattr(parameter, "quant_state", None)
    return parameter.shape if state is None else state.shape


def quantise_experts(model: nn.Module, *, double: bool, keep: Sequence[str]) -> int:
    """Put experts' weights into NF4, one tensor at a time.

    Returns how many weights.

    Args:
        double: quantise the scales once more.
        keep: ends of names that stay as they are: PEFT cannot adapt a parameter in 4 bits.
    """
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    count = 0
    for name, module, own, parameter in list(expert_parameters(model)):
        if named_by(name, keep) or hasattr(parameter, "quant_state"):
            continue
        count += parameter.numel()
        replace_parameter_4bit(
            module, own, compress_statistics=double, quant_type="nf4", blocksize=BLOCK
        )
        inner: Any = module.parametrizations[own]  # type: ignore[index, union-attr]
        inner.original.quant_state = inner[0].quant_state  # for audits, as Params4bit has it
    return count


def named_by(name: str, ends: Sequence[str]) -> bool:
    """Whether one of `ends` ends a whole name, at a dot."""
    return any(f".{name}".endswith(f".{end}") for end in ends)
