"""Small odd models of every family that `fused` supports.

Weights and adapters are drawn.
"""

from __future__ import annotations

import contextlib
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from glassloop.config import LoraConfig, ModelConfig
from glassloop.data.batches import build_pass
from glassloop.data.rows import Row
from glassloop.engines.adapters import linear_names
from glassloop.engines.build import build_engine
from glassloop.formula.optim import FlatAdapters

SIZES = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = {"num_hidden_layers": 3, "sliding_window": 5}
BOTH = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
THETAS = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 5e3, "factor": 3.0},
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Scores grow with the place from token 40 on: its rows are shorter than that.
MINISTRAL3 = YARN | {"original_max_position_embeddings": 40, "llama_4_scaling_beta": 0.5}
MINISTRAL3 |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
# name -> model_type, and what its config has beside SIZES
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "qwen2": ("qwen2", {}),
    "qwen2, windows": (
        "qwen2",
        MIXED | {"use_sliding_window": True, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3, yarn": ("qwen3", {"rope_parameters": YARN, "attention_bias": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, windows": ("mistral", {"sliding_window": 4, "head_dim": 48}),
    "ministral": ("ministral", MIXED | BOTH),
    "ministral3": ("ministral3", {"rope_parameters": MINISTRAL3}),
    "gemma2": (
        "gemma2",
        MIXED
        | BOTH
        | {
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 24,
        },
    ),
    "gemma3": ("gemma3_text", MIXED | BOTH | {"rope_parameters": THETAS}),
    "phi3": ("phi3", {"sliding_window": 6}),
    "phi3, part of a head turned": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
            }
        },
    ),
    "phi3, longrope": (
        "phi3",
        {
            "head_dim": 16,
            "original_max_position_embeddings": 40,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0 + place / 8 for place in range(8)],
                "long_factor": [2.0 + place for place in range(8)],
                "original_max_position_embeddings": 40,
            },
        },
    ),
    "granite": (
        "granite",
        {
            "attention_multiplier": 0.3,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "logits_scaling": 5.0,
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", MIXED | BOTH | {"rope_parameters": THETAS}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "glm": ("glm", {"attention_bias": True}),
    "glm4": ("glm4", {}),
    "ernie4_5": ("ernie4_5", {"use_bias": True}),
    "helium": ("helium", {"head_dim": 16}),
    "seed_oss": ("seed_oss", {}),
    "exaone4": ("exaone4", MIXED | BOTH),
    "exaone4, no windows": (
        "exaone4",
        {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    ),
}


DRAWS = 4  # of rows: the distances of a small model scatter, from 0.4 to 1.3 of the reference's


def rows_of(lengths: tuple[int, ...], seed: int = 0) -> list[Row]:
    drawn = torch.Generator().manual_seed(seed)
    return [
        Row(
            f"r{index}",
            tuple(torch.randint(3, 130, (length,), generator=drawn).tolist()),
            tuple(index != 1 and place >= length // 2 for place in range(length)),
        )
        for index, length in enumerate(lengths)
    ]


def drawn(model: torch.nn.Module) -> torch.nn.Module:
    """Give norms and biases random values too.

    Ones and zeros would hide that they are lost.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            centre = 1.0 if name.endswith("norm.weight") else 0.0
            torch.nn.init.normal_(parameter, mean=centre, std=0.2)
    return model


def saved_model(name: str, folder: Path, tokenizer: Any, **more: Any) -> tuple[Path, LoraConfig]:
    """Save a model of MODELS with adapters on all linear layers.

    `more`: fields of its config in place of its own.
    """
    kind, own = MODELS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | own | more)
    model = drawn(AutoModelForCausalLM.from_config(config))
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    return folder, LoraConfig(r=3, alpha=6, targets=linear_names(model))  # type: ignore[arg-type]


def bf16_distances(
    name: str, folder: Path, tokenizer: Any, device: torch.device, head: int = 64
) -> tuple[str, float]:
    """The check of a run on a larger bf16 model.

    Returns what it says, and the distance of the whole gradient from fp32 as a share of `peft`'s:
    the geometric mean over several draws of rows. They have 16 tokens, and windows have 9.
    """
    from glassloop.engines.fused import proof

    larger = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512, "head_dim": head}
    if MODELS[name][1].get("sliding_window"):
        larger["sliding_window"] = 9
    saved, lora = saved_model(name, folder, tokenizer, **larger)
    engine: Any = build_engine(
        ModelConfig(id=str(saved), quantization="nf4", cache_dir=str(folder / "cache")),
        lora,
        precision="bf16",
        checkpointing=False,
        seed=0,
        device=device,
        first=contextlib.nullcontext,
        engine="fused",
    )
    adapters = FlatAdapters(engine.hf.named_parameters())
    said, shares = "", []
    for seed in range(DRAWS):
        rows = proof.short_rows(rows_of((24, 31, 60, 17), seed))
        ours, plain = (
            build_pass(rows, packed=one, pad_id=0, device=device) for one in (True, False)
        )
        judged, found = proof.compared(engine, adapters, ours, plain)
        said = said or judged
        shares.append(float(found.fused.norm() / found.reference.norm()))
    return said, statistics.geometric_mean(shares)


def adapters_of(engine: Any) -> FlatAdapters:
    adapters = FlatAdapters(engine.hf.named_parameters())
    torch.manual_seed(3)
    adapters.flat.data.copy_(torch.randn_like(adapters.flat) * 0.05)
    return adapters


def fused_of(engine: Any) -> Any:
    from glassloop.engines.fused.engine import FusedEngine

    return FusedEngine(engine.hf, engine.report)


def gradient(engine: Any, adapters: FlatAdapters, p: Any) -> tuple[float, torch.Tensor]:
    adapters.zero_grad()
    loss_sum, _ = engine(p)
    (loss_sum / 7).backward()
    return loss_sum.item(), adapters.grad.clone()


def passes(*, packed: bool) -> Any:
    rows = rows_of((13, 4, 21, 1))
    return build_pass(rows, packed=packed, pad_id=0, device=torch.device("cpu"))
