"""Settings of a model's config that `fused` supports.

They are plain values, known before a weight is read. The engine refuses by the same function
(engines/fused/supported.py), and `execution.engine=auto` chooses by it (engine.py). What it
supports of a run's config is in config/support.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Fields of a model's config that change a number, with the supported values. An absent field has
# the first of them.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama", "qwen2"),
    "hidden_act": ("silu",),
    "pretraining_tp": (1, None),
    "sliding_window": (None,),
    "partial_rotary_factor": (1, 1.0, None),
}
ROTARY = ("default", "linear", "llama3")  # frequencies that do not depend on a row's length
BLOCK = 64  # weights that share a scale in NF4; a block may not reach into the next row
GROUPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
PARTS = {
    "layers",
    *(part for names in GROUPS.values() for name in names for part in name.split(".")),
}  # of the names of quantised layers
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim")
FIELDS = (
    *SUPPORTED,
    "use_sliding_window",
    "rope_parameters",
    "rope_scaling",
    "quantization_config",
    *SIZES,
)


def fields_of(config: Any) -> dict[str, Any]:
    """The values that decide, of a loaded config."""
    found = {name: getattr(config, name) for name in FIELDS if hasattr(config, name)}
    own: Any = found.get("quantization_config")
    return found | ({"quantization_config": own.to_dict()} if hasattr(own, "to_dict") else {})


def unsupported(values: Mapping[str, Any]) -> str | None:
    """Return the first model setting that `fused` does not support.

    It is a sentence; None if `fused` supports all.

    Args:
        values: of config.json, or `fields_of` the loaded config; an absent field is ordinary.
    """
    rotary = values.get("rope_parameters") or values.get("rope_scaling") or {}
    for name, supported in SUPPORTED.items():
        if (
            name == "sliding_window"
            and values.get("model_type") == "qwen2"
            and not values.get("use_sliding_window")
        ):
            continue  # its config.json names a width that is not used; transformers clears it
        value = values.get(name, rotary.get(name, supported[0]))
        if value not in supported:
            return f"the model's config has {name} = {value!r}, fused knows {_names(supported)}"
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if kind not in ROTARY:
        return f"the model's config has rope_type = {kind!r}, fused knows {_names(ROTARY)}"
    skipped = (values.get("quantization_config") or {}).get("llm_int8_skip_modules") or ()
    for name in skipped:
        if PARTS & set(str(name).split(".")):
            return (
                f"the model's own quantisation leaves out {name}, fused has every linear layer in "
                "NF4"
            )
    for what, size in _inputs(values).items():
        if size % BLOCK:
            return (
                f"the model's config has {what} = {size}, fused needs a multiple of {BLOCK}, the "
                "weights that share a scale in NF4"
            )
    return None


def _inputs(values: Mapping[str, Any]) -> dict[str, int]:
    """Inputs of the linear layers, those that the values tell."""
    found = {
        name: values[name] for name in ("hidden_size", "intermediate_size") if values.get(name)
    }
    if values.get("head_dim") and values.get("num_attention_heads"):
        found["num_attention_heads x head_dim"] = values["num_attention_heads"] * values["head_dim"]
    return found


def _names(values: tuple[Any, ...]) -> str:
    return ", ".join(map(repr, values))
