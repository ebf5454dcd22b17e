"""Weights of a mixture's experts, from its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOST_LAYERS = 10_000  # that are looked at one by one
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Kinds whose count a test compares with transformers' own models. Others go by other names too.
COUNTED = frozenset(
    """
    bailing_hybrid cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 ernie4_5_moe
    exaone_moe flex_olmo glm4_moe glm4_moe_lite glm_moe_dsa gpt_oss granitemoe granitemoehybrid
    granitemoeshared jamba lfm2_moe llama4_text minimax minimax_m2 mixtral olmoe phimoe qwen2_moe
    qwen3_5_moe_text qwen3_moe qwen3_next solar_open
    """.split()  # noqa: SIM905  (a list of them would take 30 lines)
)


def expert_weights(values: Mapping[str, Any]) -> int:
    """Weights of all experts; 0 for a model without.

    Raises an ordinary error of Python's for a size that is missing or garbled.
    """
    values = values.get("text_config") or values
    count = _count(values)
    inner = int(values.get("moe_intermediate_size") or values["intermediate_size"])
    return _sparse_layers(values) * count * 3 * int(values["hidden_size"]) * inner if count else 0


def experts_in_words(values: Mapping[str, Any]) -> str:
    """A mixture's experts for a plan, or that they are not counted."""
    text = values.get("text_config") or values
    try:
        if not _count(text):
            return ""
        if text.get("model_type") not in COUNTED:
            return "; its experts are not counted here"
        weights = expert_weights(values)
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError):
        return ""  # a size is garbled, and the model is not supported here in any case
    size, loading = f"{weights / 2 / 2**30:.1f} GiB", f"{2 * weights / 2**30:.1f} GiB"
    return f"; its {weights:,} weights of experts are {size} in NF4, and {loading} while it loads"


def _count(values: Mapping[str, Any]) -> int:
    """Experts of a layer."""
    if values.get("is_moe") is False:  # Doge has their number in any case
        return 0
    return next((int(values[name]) for name in COUNTS if values.get(name)), 0)


def _sparse_layers(values: Mapping[str, Any]) -> int:
    """Layers that have experts."""
    layers = min(int(values["num_hidden_layers"]), MOST_LAYERS)
    if kinds := values.get("mlp_layer_types"):
        return sum(kind != "dense" for kind in kinds)
    if (named := values.get("moe_layers")) is not None:
        return len(named)
    dense = set(values.get("mlp_only_layers") or ())
    first = int(values.get("first_k_dense_replace") or values.get("num_dense_layers") or 0)
    first = int(values.get("moe_layer_start_index") or first)
    last = int(values.get("moe_layer_end_index") or -1)
    step = values.get("decoder_sparse_step") or values.get("interleave_moe_layer_step")
    step = int(step or values.get("moe_layer_interval") or 1)
    period, offset = int(values.get("expert_layer_period") or 1), values.get("expert_layer_offset")
    return sum(
        layer not in dense
        and (layer + 1) % step == 0
        and layer % period == int(offset or 0) % period
        for layer in range(first, layers if last < 0 else min(layers, last + 1))
    )
