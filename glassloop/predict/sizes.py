"""Bounds on sizes in a model's config.json, which a stranger may write.

They lie far above any model there is, and far below what hangs a library or fills the memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glassloop.predict.experts import COUNTS

LAYERS, HEADS, WIDTH, EXPERTS = 1024, 65_536, 1 << 20, 65_536
MOST = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), HEADS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "head_dim"), WIDTH),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size"), WIDTH),
    "vocab_size": 1 << 24,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 1 << 30),
    **dict.fromkeys(COUNTS, EXPERTS),
}
MAY_BE_ZERO = COUNTS
LISTS = ("layer_types", "mlp_layer_types")  # one entry a layer


def odd_size(values: Mapping[str, Any], prefix: str = "") -> str | None:
    """Name the first absurd size; None if there is none.

    It is `field = value: bounds`. A size may be null or absent; transformers then has a default.
    """
    for name, most in MOST.items():
        value = values.get(name)
        least = 0 if name in MAY_BE_ZERO else 1
        if value is None or (type(value) is int and least <= value <= most):
            continue
        if type(value) is list and all(type(v) is int and 0 <= v <= most for v in value[:LAYERS]):
            continue  # one size a layer, as OpenELM has
        return f"{prefix}{name} = {repr(value)[:40]}: it must be a whole number, {least} to {most}"
    for name in LISTS:
        if isinstance(many := values.get(name), list) and len(many) > LAYERS:
            return f"{prefix}{name} has {len(many):,} entries: there may be {LAYERS}"
    for name in ("text_config", "llm_config"):
        inner = values.get(name)
        odd = odd_size(inner, f"{name}.") if isinstance(inner, dict) else None
        if odd is not None:
            return odd
    return None
