"""Models of families.py: drawn weights of real shapes, in NF4, on a card or saved in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from glassloop.base.random import random_folder
from glassloop.base.reading import attention_for, prepare_4bit

ROPE = {"rope_type": "default", "rope_theta": 1e6}


def sizes(
    layers: int, hidden: int, inner: int, heads: int, keys: int, head: int, words: int
) -> dict[str, Any]:
    names = "num_hidden_layers hidden_size intermediate_size num_attention_heads"
    names += " num_key_value_heads head_dim vocab_size"
    return dict(zip(names.split(), (layers, hidden, inner, heads, keys, head, words), strict=True))


# name -> model_type, its config
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3-8b": ("llama", sizes(32, 4096, 14336, 32, 8, 128, 128256)),
    "qwen3-8b": ("qwen3", sizes(36, 4096, 12288, 32, 8, 128, 151936)),
    "mistral-7b": (
        "mistral",
        sizes(32, 4096, 14336, 32, 8, 128, 32768) | {"sliding_window": None},
    ),
    "gemma-3-12b": (
        "gemma3_text",
        sizes(48, 3840, 15360, 16, 8, 256, 262208)
        | {"sliding_window": 1024, "query_pre_attn_scalar": 256},
    ),
    "llama-3.2-3b": (
        "llama",
        sizes(28, 3072, 8192, 24, 8, 128, 128256) | {"tie_word_embeddings": True},
    ),
    "phi-4": ("phi3", sizes(40, 5120, 17920, 40, 10, 128, 100352)),
}


def drawn_model(name: str, device: torch.device, layers: int | None, small: bool) -> Any:
    """A base in NF4 with drawn weights, in bf16 on a GPU and fp32 on a CPU."""
    kind, values = MODELS[name]
    values = values | {"pad_token_id": 0, "max_position_embeddings": 8192}
    if layers is not None:
        values["num_hidden_layers"] = layers
    if small:
        values |= {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 1024}
        values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = AutoConfig.for_model(kind, **values)
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention_for("sdpa", config)
        )
    head = hf.get_output_embeddings()
    drawn = torch.Generator(device).manual_seed(0)

    def normal(shape: torch.Size, std: float) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, std, generator=drawn)

    for path, module in list(hf.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            weight = normal(module.weight.shape, module.in_features**-0.5)
            hf.set_submodule(path, quantised(weight, dtype))
    decoder = hf.get_decoder()
    for path, parameter in list(hf.named_parameters()):
        if not parameter.is_meta:
            continue
        owner, _, leaf = path.rpartition(".")
        plain = parameter.ndim > 1
        value = normal(parameter.shape, 0.02) if plain else neutral(parameter, decoder, dtype)
        setattr(hf.get_submodule(owner), leaf, nn.Parameter(value.to(device), False))
    hf.tie_weights()
    decoder.rotary_emb = type(decoder.rotary_emb)(config=config).to(device)
    embedding = hf.get_input_embeddings()
    if hasattr(embedding, "scalar_embed_scale"):
        embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, device=device)
    hf.is_loaded_in_4bit = hf.is_quantized = True
    hf.eval().requires_grad_(False)
    prepare_4bit(hf, dtype)
    return hf


def neutral(parameter: torch.Tensor, decoder: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """A norm's weight that multiplies by 1: 0 where one is added to it."""
    adds = type(decoder.norm).__name__.startswith("Gemma")  # type: ignore[union-attr]
    return torch.full(parameter.shape, 0.0 if adds else 1.0, dtype=dtype)


def quantised(weight: torch.Tensor, dtype: torch.dtype) -> nn.Module:
    """A bitsandbytes layer with double quantisation over `weight` (N, K)."""
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    rows, columns = weight.shape
    codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    make: Any = Params4bit
    meta = torch.device("meta")
    layer: Any = Linear4bit(columns, rows, False, dtype, True, "nf4", device=meta)
    layer.weight = make(
        codes,
        requires_grad=False,
        quant_state=state,
        blocksize=64,
        compress_statistics=True,
        quant_type="nf4",
        module=layer,
        bnb_quantized=True,
    )
    layer.quant_state = state
    return layer


def save_base(hf: Any, folder: Path) -> None:
    """Write a drawn model as a folder that comes in NF4, with a small tokenizer."""
    form = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    tied = (
        set(getattr(hf, "_tied_weights_keys", None) or ()) if hf.config.tie_word_embeddings else ()
    )
    state = hf.state_dict()
    kept = {name: tensor.cpu().contiguous() for name, tensor in state.items() if name not in tied}
    folder.mkdir()
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    values = hf.config.to_dict() | {"quantization_config": form.to_dict()}
    values["architectures"] = [type(hf).__name__]
    (folder / "config.json").write_text(json.dumps(values, default=str), encoding="utf-8")
    tokenizer = random_folder("random:tiny", folder.parent / "cache")
    for file in tokenizer.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
