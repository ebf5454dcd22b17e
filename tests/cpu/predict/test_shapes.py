"""Sizes read from a config.json."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from glassloop.base.checks import dtype_audit
from glassloop.base.experts import expert_parameters
from glassloop.predict.experts import COUNTED, expert_weights
from glassloop.predict.shapes import shapes_of

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
MIXTURES = {
    "qwen3_moe": {"moe_intermediate_size": 16, "num_experts": 4, "mlp_only_layers": [1]},
    "qwen2_moe": {"moe_intermediate_size": 16, "num_experts": 4, "decoder_sparse_step": 2},
    "mixtral": {"num_local_experts": 4},
    "deepseek_v3": {
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "first_k_dense_replace": 2,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
    },
    "jamba": {"num_experts": 4, "expert_layer_period": 2, "expert_layer_offset": 1},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_intermediate_size": 16, "moe_k": 2},
    "llama4_text": {"num_local_experts": 4, "moe_layers": [2], "intermediate_size_mlp": 64},
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_plan_counts_the_experts_that_the_model_has(kind, tmp_path):
    more = {"num_experts_per_tok": 2, **MIXTURES[kind]}
    config = AutoConfig.for_model(kind, **SIZES, **more)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counted = sum(group.parameters for group in dtype_audit(model) if group.kind == "experts")
    assert expert_weights(config.to_dict()) == counted > 0
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
    shapes, why = shapes_of(str(tmp_path))
    assert shapes is None and f"its {counted:,} weights of experts are 0.0 GiB in NF4, and" in why


@pytest.mark.thorough
@pytest.mark.parametrize("kind", sorted(COUNTED))
def test_experts_of_each_counted_kind_are_those_of_its_default_config(kind):
    more = {"layer_types": ["conv", "full_attention"] * 16} if kind == "lfm2_moe" else {}
    config = AutoConfig.for_model(kind, **more)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counted = sum(weights.numel() for *_, weights in expert_parameters(model))
    assert expert_weights(config.to_dict()) == counted > 0


def test_experts_of_another_kind_are_not_counted_and_a_plan_says_so(tmp_path):
    odd = {"model_type": "jetmoe", "num_local_experts": 8, **SIZES}
    (tmp_path / "config.json").write_text(json.dumps(odd))
    assert shapes_of(str(tmp_path))[1].endswith("; its experts are not counted here")
    (tmp_path / "config.json").write_text(json.dumps(odd | {"num_local_experts": 0}))
    assert shapes_of(str(tmp_path))[1].endswith(", exaone4")


def test_garbled_sizes_of_experts_are_no_traceback_and_no_wait(tmp_path):
    for values in ({"num_experts": "x"}, {"num_experts": 4}, {"num_experts": 4, **SIZES}):
        odd = {**values, "num_hidden_layers": 10**12, "decoder_sparse_step": "y"}
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", **odd}))
        assert shapes_of(str(tmp_path))[0] is None
