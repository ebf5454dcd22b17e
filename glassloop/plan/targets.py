"""The layers that get an adapter where nobody named them."""

from __future__ import annotations

from collections.abc import Collection

from glassloop.config import ALL_LINEAR, PROJECTIONS, Config


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


def reach_in_words(without: int, total: int, names: Collection[str]) -> str:
    """Count linear weights without an adapter; empty if there are none."""
    if not without:
        return ""
    share = f"{without:,} of {total:,} linear weights ({without / total:.0%})"
    return f"{share} have no adapter: {', '.join(names)}"
