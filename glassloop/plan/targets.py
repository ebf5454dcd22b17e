"""The layers that get an adapter where nobody named them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from glassloop.config import ALL_LINEAR, PROJECTIONS, Config, LoraConfig
from glassloop.config.lora import matches
from glassloop.predict.shapes import Shapes


def needs_names(config: Config, names: Collection[str]) -> bool:
    """True if the default lora.targets name layers that are missing.

    `names`: the model's.
    """
    return "targets" not in config.lora.model_fields_set and not set(PROJECTIONS) <= set(names)


def with_targets(config: Config, names: Collection[str]) -> Config:
    """Take every linear layer if the default names missing ones.

    `names`: last parts of the names of the model's linear layers.
    """
    if not needs_names(config, names):
        return config
    lora = config.lora.model_copy(update={"targets": (ALL_LINEAR,)})
    return config.model_copy(update={"lora": lora})


def trainable(shapes: Shapes, lora: LoraConfig) -> int:
    """Trainable parameters: of adapters, and of tokens that train whole.

    Raises ValueError for a target, a pattern or a token that the model does not have.
    """
    tokens = len(lora.trainable_token_indices) * shapes.hidden
    found = shapes.trainable(lora.rank_of, lora.targets) + tokens
    names = ", ".join(lora.targets)
    check_patterns(lora, names, shapes.adapted(lora.targets))
    check_tokens(lora, {"vocab_size": shapes.vocabulary})
    return found


def check_patterns(lora: LoraConfig, names: str, paths: Sequence[str]) -> None:
    """Raise ValueError for a pattern that names no layer with an adapter.

    Args:
        names: of such layers, for people. paths: their whole names, target parameters included.
    """
    for field, patterns in (("rank_pattern", lora.ranks), ("alpha_pattern", lora.alphas)):
        for pattern in patterns:
            if not any(matches(pattern, path) for path in paths):
                raise ValueError(
                    f"lora.{field}.{pattern} names no layer that gets an adapter: they are "
                    f"{names}, in full such as {paths[0]}"
                )


def check_tokens(lora: LoraConfig, values: Mapping[str, Any]) -> None:
    """Raise ValueError for tokens that the model cannot train.

    Args:
        values: of the model's config.
    """
    if not (ids := lora.trainable_token_indices):
        return
    text = values.get("text_config") or values
    size = text.get("vocab_size")
    if size is not None and max(ids) >= size:
        raise ValueError(
            f"lora.trainable_token_indices = {max(ids)}: the embedding has {size} rows; resize the "
            "model for its new tokens first, and save it"
        )


def reach_in_words(without: int, total: int, names: Collection[str]) -> str:
    """Count linear weights without an adapter; empty if there are none."""
    if not without:
        return ""
    share = f"{without:,} of {total:,} linear weights ({without / total:.0%})"
    return f"{share} have no adapter: {', '.join(names)}"
