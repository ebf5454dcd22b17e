"""Tables of what an engine supports of a run's config.

`peft` supports all of it.

What `fused` supports of a model's own config is in plan/support.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limit:
    """A field, the values that an engine supports, reason and cure."""

    field: str
    values: tuple[Any, ...]
    why: str
    cure: str


FUSED = (
    Limit("model.quantization", ("nf4",), "fused has its weights in NF4", "set it to nf4"),
    Limit("model.attention", ("sdpa",), "fused chooses attention itself", "leave it at sdpa"),
    Limit("lora.dropout", (0,), "fused has none", "set it to 0"),
    Limit("lora.target_parameters", ((),), "fused has no experts", "leave them out"),
    Limit(
        "lora.trainable_token_indices", ((),), "fused trains no embedding", "leave the tokens out"
    ),
    Limit(
        "execution.precision", ("bf16", "fp32"), "fused computes in bf16 or fp32", "set it to bf16"
    ),
    Limit(
        "execution.reduction",
        ("explicit",),
        "fused writes gradients in place, and DDP would reduce zeros",
        "set it to explicit",
    ),
)
UNSLOTH = (
    Limit("model.quantization", ("nf4",), "unsloth gets its bases in NF4", "set it to nf4"),
    Limit("model.attention", ("sdpa",), "unsloth chooses attention itself", "leave it at sdpa"),
    Limit("lora.rslora", (False,), "its kernels were not held to that scale", "set it to false"),
    Limit("lora.rank_pattern", ((),), "its kernels were not held to it", "leave it out"),
    Limit("lora.alpha_pattern", ((),), "its kernels were not held to it", "leave it out"),
    Limit("lora.target_parameters", ((),), "its kernels were not held to it", "leave it out"),
    Limit(
        "lora.trainable_token_indices", ((),), "unsloth trains no embedding", "leave the tokens out"
    ),
    Limit("lora.dropout", (0,), "its recomputed layers would use a different mask", "set it to 0"),
    Limit(
        "execution.precision", ("bf16", "fp16"), "its kernels compute in 16 bits", "set it to bf16"
    ),
    Limit(
        "execution.reduction", ("explicit",), "DDP is there for the reference", "set it to explicit"
    ),
)
LIMITS = {"fused": FUSED, "unsloth": UNSLOTH, "peft": (), "auto": ()}


def beyond(sections: Mapping[str, Any], engine: str) -> tuple[str, Limit] | None:
    """The first unsupported field, as 'field = value', with its limit.

    Args:
        sections: the config's sections by name.
    """
    for limit in LIMITS[engine]:
        section, _, name = limit.field.partition(".")
        value = getattr(sections[section], name)
        if value not in limit.values:
            shown = f"{value:g}" if isinstance(value, float) else value
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else shown
            return f"{limit.field} = {shown}", limit
    return None
