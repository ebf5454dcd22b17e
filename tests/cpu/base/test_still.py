"""No base draws random numbers of its own while it trains."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    SeedOssConfig,
    SeedOssForCausalLM,
)

from glassloop.base.still import check_still, silence

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
MODELS = {
    "modules": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    ),
    "functional": lambda: SeedOssForCausalLM(
        SeedOssConfig(**SIZES, head_dim=8, attention_dropout=0.1, residual_dropout=0.1)
    ),
    "attention": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_dropout=0.1)),
    "layers": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=64,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            dropout=0.0,
            layerdrop=0.5,
        )
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_every_rate_is_found_set_to_0_and_said(kind):
    torch.manual_seed(0)
    model = MODELS[kind]().train()
    ids = torch.arange(12).unsqueeze(0)
    assert not torch.equal(model(ids).logits, model(ids).logits), "it does draw before"
    with pytest.raises(ValueError, match=r"draws random numbers in training mode"):
        check_still(model, CPU, "m")
    assert silence(model).startswith("the base's own dropout is set to 0 (")
    assert torch.equal(model(ids).logits, model(ids).logits)
    check_still(model, CPU, "m")
    assert silence(model) == "" and model.training


def test_rates_that_only_the_config_holds_are_set_to_0_too():
    """Some models read them in every forward pass."""
    model = MODELS["attention"]()
    for module in model.modules():
        vars(module).pop("attention_dropout", None)
    assert "attention_dropout 0.1" in silence(model)
    assert model.config.attention_dropout == 0


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x) if self.training else x


def test_noise_under_no_known_name_is_refused_and_random_numbers_stay():
    model = MODELS["attention"]().eval()
    silence(model)
    before = torch.get_rng_state()
    check_still(model, CPU, "m")
    model.model.norm = nn.Sequential(model.model.norm, Noisy())
    with pytest.raises(ValueError, match=r"model.id = m: LlamaForCausalLM draws random numbers"):
        check_still(model, CPU, "m")
    assert torch.equal(before, torch.get_rng_state()) and not model.training
