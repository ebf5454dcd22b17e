"""Families other than Llama on one CUDA device: kernels near fp64, bf16 models near fp32.

Models are small, with head sizes and rows that reach each attention kernel and window.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import MODELS, adapters_of, bf16_distances, fused_of, gradient, rows_of
from transformers import AutoConfig, AutoModelForCausalLM

from glassloop.base.checks import dtype_audit
from glassloop.config import LoraConfig, ModelConfig
from glassloop.data.batches import build_pass
from glassloop.engines.build import build_engine
from glassloop.predict.tiers import Tiers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

HEADS = {"gemma2": 128, "gemma3": 256}  # of a model that has another head size in practice


def on_card(folder: Path, lora: LoraConfig, precision: str = "fp32") -> Any:
    """The reference engine in NF4."""
    return build_engine(
        ModelConfig(id=str(folder)),
        lora,
        precision=precision,
        checkpointing=False,
        seed=0,
        device=torch.device("cuda", 0),
        first=contextlib.nullcontext,
    )


def off(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize("name", [name for name in MODELS if "longrope" not in name])
def test_a_bf16_model_is_no_further_from_fp32_than_the_reference(name, tmp_path, tiny_tokenizer):
    device, head = torch.device("cuda", 0), HEADS.get(name, 64)
    said, share = bf16_distances(name, tmp_path, tiny_tokenizer, device, head)
    assert said == "" and share <= 1.1


SCORES = [(None, 100), (50.0, None), (50.0, 100)]


@pytest.mark.parametrize(("cap", "window"), SCORES)
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("kernel", ["triton", "flash"])
def test_windows_and_caps_are_near_fp64(kernel, size, cap, window):
    """Also those that the engine does not choose: of triton for heads of 256."""
    from glassloop.engines.fused import attention as a
    from glassloop.engines.fused.attention_work import TILES, Scores, Tile, Tiles
    from glassloop.engines.fused.rotary import angles

    if kernel == "flash" and cap is not None:
        pytest.skip("torch's kernel has no cap")
    wide = Tile(32, 32, 8, 2)
    tiles = TILES.get(size, Tiles(wide, wide, wide))
    lengths, heads, keys = (300, 17, 1, 700), 4, 2
    tokens = sum(lengths)
    torch.manual_seed(0)
    parts = [
        torch.randn(tokens, count, size, device="cuda").bfloat16() for count in (heads, keys, keys)
    ]
    grad = torch.randn(tokens, heads, size, device="cuda").bfloat16()
    by = angles(torch.arange(tokens, device="cuda"), torch.rand(size // 2, device="cuda"), 1.0)
    found = []
    for one, tensors in (
        (kernel, [grad, *parts]),
        ("reference", [t.double() for t in (grad, *parts)]),
    ):
        bounds = a.Bounds.for_kernel(one, lengths, grad.device, tiles, Scores(None, cap, window))
        kept = a.attention(*tensors[1:], bounds)
        found.append((kept.out, a.attention_backward(*tensors, kept, bounds, by)))
    assert off(found[0][0], found[1][0]) < 8e-3
    widths = [count * size for count in (heads, keys, keys)]
    for ours, truth in zip(found[0][1].split(widths, 1), found[1][1].split(widths, 1), strict=True):
        assert off(ours, truth) < 8e-3


@pytest.mark.parametrize("tiers", ["kept", "recomputed", "chunked", "held"])
def test_ranks_that_differ_between_layers_are_peft_s_on_a_card(tiny_llama, tiers):
    """One room a group for layers of several ranks, and moves of several shapes in one launch."""
    device = torch.device("cuda", 0)
    ranks = ("layers.0.self_attn.q_proj=19", "k_proj=1", "layers.1.mlp.down_proj=40")
    lora = LoraConfig(r=4, alpha=8, rank_pattern=ranks, alpha_pattern=("v_proj=2.5",))
    engine = on_card(tiny_llama, lora)
    adapters = adapters_of(engine)
    p, plain = (
        build_pass(rows_of((13, 4, 21, 1)), packed=one, pad_id=0, device=device)
        for one in (True, False)
    )
    wanted, slope = gradient(engine, adapters, plain)
    fused = fused_of(engine)
    how = {"kept": Tiers(2), "recomputed": Tiers(0, "all"), "chunked": Tiers(0, "all", chunk=7)}
    fused.use_tiers(how.get(tiers, Tiers(1, held=2)))
    found, ours = gradient(fused, adapters, p)
    assert found == pytest.approx(wanted, rel=1e-4)
    assert float((ours - slope).norm() / slope.norm()) < 1e-4


def test_tokens_train_and_experts_lie_in_4_bits_on_a_card(tiny_llama, tmp_path, tiny_tokenizer):
    tokens = LoraConfig(r=4, alpha=8, trainable_token_indices=(17, 4))
    engine = on_card(tiny_llama, tokens, precision="bf16")
    rows = [p for name, p in engine.hf.named_parameters() if "trainable_tokens" in name]
    assert [(one.dtype, one.device.type, one.requires_grad) for one in rows] == [
        (torch.float32, "cuda", True)
    ]
    sizes = dict(vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, pad_token_id=0)
    experts = dict(moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2)
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", **sizes, **heads, **experts)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "moe")
    tiny_tokenizer.save_pretrained(tmp_path / "moe")
    lora = LoraConfig(r=4, alpha=8, targets=("q_proj",))
    mixture = on_card(tmp_path / "moe", lora, precision="bf16")
    groups = {group.kind: group for group in dtype_audit(mixture.hf)}
    assert groups["quantised experts"].parameters == 2 * 4 * 3 * 64 * 64
    ids = torch.arange(5, 25, device="cuda").unsqueeze(0)
    mixture.hf(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    grads = [p.grad for p in mixture.hf.parameters() if p.requires_grad and p.grad is not None]
    assert grads and all(bool(one.isfinite().all()) for one in grads)
