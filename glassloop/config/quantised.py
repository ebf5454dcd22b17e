"""Repositories that come quantised: those that are read, judged by their config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glassloop.config.config import ModelConfig

REQUANTISED = ("fp8", "mxfp4")  # quantization_config.quant_method that base/requantised.py reads


def rounds_again(own: Mapping[str, Any], model: ModelConfig) -> bool:
    """Whether model.requantize rounds a repository's weights to NF4.

    Args:
        own: its quantization_config.
    """
    return (
        model.requantize and own.get("quant_method") in REQUANTISED and model.quantization == "nf4"
    )


def unread_quantization(own: Mapping[str, Any], model: ModelConfig) -> str | None:
    """The reason why a repository is refused; None if it is read.

    Args:
        own: its quantization_config.
    """
    if rounds_again(own, model):
        return None
    kind = own.get("quant_method", "unknown")
    if own.get("load_in_4bit"):
        kind = own.get("bnb_4bit_quant_type")
    elif own.get("load_in_8bit"):
        kind = "8 bits"
    if kind != "nf4":
        again = "set model.requantize=true to round its weights to NF4 once more, or "
        cure = again if kind in REQUANTISED and model.quantization == "nf4" else ""
        return (
            f"model.id = {model.id} comes quantised as {kind}, not as NF4 by bitsandbytes: {cure}"
            "take the unquantised repository"
        )
    if model.quantization != "nf4":
        return (
            f"model.id = {model.id} comes quantised as NF4, but model.quantization = "
            f"{model.quantization}: set it to nf4"
        )
    return None
