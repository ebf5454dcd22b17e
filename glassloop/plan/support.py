"""Models that `fused` supports, judged before a weight is read.

The engine refuses by the same functions (engines/fused/supported.py), and `execution.engine=auto`
chooses by them (engine.py). What it supports of a run's config is in config/support.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glassloop.plan.described import Described
from glassloop.plan.families import FREE, Unsupported, described, text_of

BLOCK = 64  # weights that share a scale in NF4; a block may not reach into the next row


def fields_of(config: Any) -> dict[str, Any]:
    """The values of a loaded config."""
    found = config.to_dict() | {"model_type": config.model_type}
    own: Any = found.get("quantization_config")
    return found | ({"quantization_config": own.to_dict()} if hasattr(own, "to_dict") else {})


def description_of(values: Mapping[str, Any]) -> Described:
    """Describe a model.

    Raises Unsupported naming the first setting that is not supported.

    Args:
        values: of config.json, or `fields_of` the loaded config; an absent field is ordinary.
    """
    found, _ = described(values)
    parts = {"layers"} | {
        part for names in found.groups.values() for name in names for part in name.split(".")
    }  # of the names of quantised layers
    for name in (values.get("quantization_config") or {}).get("llm_int8_skip_modules") or ():
        if parts & set(str(name).split(".")):
            raise Unsupported(
                f"the model's own quantisation leaves out {name}, fused has every linear layer in "
                "NF4"
            )
    for what, size in _inputs(text_of(values)).items():
        if size % BLOCK:
            raise Unsupported(
                f"the model's config has {what} = {size}, fused needs a multiple of {BLOCK}, the "
                "weights that share a scale in NF4"
            )
    return found


def unsupported(values: Mapping[str, Any]) -> str | None:
    """The first model setting that `fused` does not support, in words.

    None if it supports all.
    """
    try:
        description_of(values)
    except Unsupported as error:
        return str(error)
    return None


def longest_row(values: Mapping[str, Any]) -> int | None:
    """Tokens of the longest row that `fused` supports; None: of any length."""
    return description_of(values).longest


def groups_of(values: Mapping[str, Any]) -> Mapping[str, tuple[str, ...]]:
    """Linear layers of a decoder layer by group.

    Raises Unsupported as `description_of` does.
    """
    return description_of(values).groups


def check_fields(values: Mapping[str, Any], declared: frozenset[str]) -> None:
    """Raise Unsupported for a set field that no description reads.

    Args:
        declared: fields of transformers' config class. Others of a config.json have no effect.
    """
    known = described(values)[1] | FREE
    for name in sorted(declared - known):
        if not name.startswith("_") and values.get(name):
            raise Unsupported(
                f"the model's config has {name} = {values[name]!r}, which fused does not know"
            )


def _inputs(values: Mapping[str, Any]) -> dict[str, int]:
    """Inputs of the linear layers, those that the values tell."""
    found = {
        name: values[name] for name in ("hidden_size", "intermediate_size") if values.get(name)
    }
    if values.get("head_dim") and values.get("num_attention_heads"):
        found["num_attention_heads x head_dim"] = values["num_attention_heads"] * values["head_dim"]
    return found
