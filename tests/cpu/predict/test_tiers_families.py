"""Bytes of families with more norms than Llama, predicted from shapes as they live."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from phases import check_phases
from transformers import AutoConfig, AutoModelForCausalLM

from glassloop.predict.tiers import Tiers


@pytest.fixture(scope="module", params=["gemma3_text", "olmo2", "qwen3"])
def wide_family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a family's model with the sizes of wide_llama."""
    folder = tmp_path_factory.mktemp("wide")
    sizes = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 896}
    heads = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = AutoConfig.for_model(request.param, **sizes, **heads, head_dim=32, pad_token_id=0)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the engine needs triton")
@pytest.mark.parametrize(
    "chosen", [Tiers(4), Tiers(0), Tiers(1, "inputs"), Tiers(1, "all")], ids=str
)
def test_each_phase_is_predicted_as_its_bytes_live(wide_family, engine_of, chosen):
    check_phases(wide_family, engine_of, chosen)
