"""lora.targets=all-linear: every linear layer but the head, named on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from transformers import Phi3Config, Phi3ForCausalLM

from glassloop.config import PROJECTIONS
from glassloop.config.arguments import ConfigError, parse


@pytest.fixture
def tiny_phi3(tmp_path: Path, tiny_tokenizer) -> Path:
    """A decoder whose projections are joined: qkv_proj and gate_up_proj."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = Phi3ForCausalLM(Phi3Config(**sizes, **heads, **ids)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "phi3")
    tiny_tokenizer.save_pretrained(tmp_path / "phi3")
    return tmp_path / "phi3"


def test_every_linear_layer_but_the_head_gets_an_adapter(run_of, tiny_phi3: Path) -> None:
    run = run_of(
        model={"id": str(tiny_phi3), "quantization": "none"},
        lora={"targets": ["all-linear"]},
        execution={"precision": "fp32"},
    )
    names = ("o_proj", "qkv_proj", "gate_up_proj", "down_proj")
    assert sorted(run.config.lora.targets) == sorted(names)
    recorded = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert sorted(recorded["lora"]["targets"]) == sorted(names)
    adapters = [
        name for name, _ in run.replica.plain_engine.hf.named_parameters() if "lora_" in name
    ]
    assert len(adapters) == 2 * 2 * len(names)  # A and B, two layers
    run.close()


def test_of_a_llama_it_names_the_seven(run_of) -> None:
    run = run_of(lora={"targets": ["all-linear"]}, execution={"precision": "fp32"})
    assert run.config.lora.targets == PROJECTIONS
    run.close()


def test_it_stands_alone_and_a_missing_layer_names_it(run_of, tiny_phi3: Path) -> None:
    with pytest.raises(ConfigError, match="all-linear already has every layer"):
        parse(["lora.targets=all-linear,q_proj"])
    with pytest.raises(ValueError, match="Name those, or set"):
        run_of(model={"id": str(tiny_phi3), "quantization": "none"})
