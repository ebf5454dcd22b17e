"""Reads a base's files through transformers, and refuses what it lets pass."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from glassloop.base.source import (
    BaseError,
    BaseSource,
    check_config,
    damaged_copy,
    loading_errors,
    without_sdpa,
)
from glassloop.config import ModelConfig
from glassloop.config.quantised import rounds_again, unread_quantization

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def read_model(
    path: str,
    revision: str | None,
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    quantize: BitsAndBytesConfig | None = None,
    copy: Path | None = None,
) -> PreTrainedModel:
    settings = {} if quantize is None else {"quantization_config": quantize}
    with loading_errors(model, copy):
        config = AutoConfig.from_pretrained(
            path, revision=revision, trust_remote_code=model.trust_remote_code
        )
        hf, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            path,
            revision=revision,
            dtype=dtype,
            device_map={"": device},
            attn_implementation=attention_for(model.attention, config),
            trust_remote_code=model.trust_remote_code,
            output_loading_info=True,
            **settings,
        )
    if wrong := _wrong_weights(hf, info["missing_keys"]):
        cure = "take a complete repository or folder whose config fits its weights"
        raise BaseError(
            damaged_copy(model, copy, wrong) if copy else f"model.id = {model.id}: {wrong}: {cure}"
        )
    hf.requires_grad_(False)
    if copy is None and quantize is None:
        _to_dtype(hf, dtype)
    prepare_4bit(hf, dtype)
    return hf


def attention_for(asked: str, config: Any) -> str:
    """The attention that transformers uses for model.attention.

    Eager for sdpa if the model caps its scores, because sdpa has no cap.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return "eager" if asked == "sdpa" and capped else asked


def check_attention(source: BaseSource, model: ModelConfig) -> None:
    """Raise BaseError for attention that the model's class lacks.

    transformers refuses it too, once a base in MXFP4 has been widened.
    """
    if source.drawn is not None:
        return
    with loading_errors(model):
        config = AutoConfig.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=model.trust_remote_code
        )
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    supported = getattr(kind, "_supports_sdpa", True)  # code of the model's own is asked later
    if attention_for(model.attention, config) == "sdpa" and not supported:
        raise BaseError(without_sdpa(model))


def _to_dtype(hf: PreTrainedModel, dtype: torch.dtype) -> None:
    """Widen the 16-bit tensors of a base that comes quantised.

    transformers ignores dtype for them.
    """
    for parameter in hf.parameters():
        narrow = parameter.is_floating_point() and parameter.element_size() < dtype.itemsize
        if narrow and not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.to(dtype)


def _wrong_weights(hf: PreTrainedModel, missing: Iterable[str]) -> str:
    """Name weights that transformers lets pass: drawn at random, or misshapen.

    Empty if all are right.
    """
    if names := sorted(missing):
        return (
            f"{len(names)} weights are missing from its files and would be random "
            f"({', '.join(names[:3])})"
        )
    for name, module in hf.named_modules():
        state = getattr(module, "quant_state", None)
        if state is not None and tuple(state.shape) != (module.out_features, module.in_features):
            return (
                f"{name} is {tuple(state.shape)} in its files, ({module.out_features}, "
                f"{module.in_features}) in config.json"
            )
    return ""


def prepare_4bit(hf: nn.Module, dtype: torch.dtype) -> None:
    """Set the compute dtype of 4-bit layers; forbid repacking on a CPU.

    bitsandbytes 0.50, on a CPU with AVX512-BF16: the first no-grad forward in eval mode repacks a
    layer's weight for a kernel without a backward pass. Later training forwards lose part of their
    gradient with a mere warning.
    """
    for module in hf.modules():
        if hasattr(module, "quant_state") and hasattr(
            module, "compute_dtype"
        ):  # bitsandbytes' Linear4bit
            module.compute_dtype = dtype  # type: ignore[assignment]
            module.compute_type_is_set = True  # type: ignore[assignment]
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def own_quantization(source: BaseSource, model: ModelConfig) -> dict[str, Any] | None:
    """The quantization_config that a repository brings; None if it has none."""
    check_config(source, model)
    with loading_errors(model):
        config = AutoConfig.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=model.trust_remote_code
        )
    own = getattr(config, "quantization_config", None)
    return own if own is None or isinstance(own, dict) else own.to_dict()


def kept_quantization(
    source: BaseSource, model: ModelConfig, dtype: torch.dtype
) -> tuple[dict[str, Any] | None, list[str]]:
    """The quantization that a base keeps, and notes on it.

    None if it has none, or one that is rounded to NF4 again. Raises BaseError for another one.
    """
    own = own_quantization(source, model)
    if own is None:
        return None, []
    kind = own.get("quant_method")
    if rounds_again(own, model):
        return None, [
            f"model.id = {model.id} comes quantised as {kind}: model.requantize rounds its weights "
            "to NF4 once more"
        ]
    return own, compare_own_quantization(own, model, dtype)


def compare_own_quantization(
    own: dict[str, Any], model: ModelConfig, dtype: torch.dtype
) -> list[str]:
    """Notes on a repository that comes quantised: its settings are kept.

    Raises BaseError unless they are NF4 by bitsandbytes.
    """
    if (problem := unread_quantization(own, model)) is not None:
        raise BaseError(problem)
    notes = [f"model.id = {model.id} comes quantised: its own NF4 weights are used"]
    double = bool(own.get("bnb_4bit_use_double_quant"))
    if double != model.double_quantization:
        notes.append(
            f"its double quantisation is {double}; model.double_quantization = "
            f"{model.double_quantization} has no effect"
        )
    compute, wanted = (
        str(d).removeprefix("torch.") for d in (own.get("bnb_4bit_compute_dtype"), dtype)
    )
    if compute != wanted:
        notes.append(f"its compute dtype {compute} is replaced by {wanted}")
    return notes
