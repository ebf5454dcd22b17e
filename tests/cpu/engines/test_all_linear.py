"""lora.targets=all-linear: every linear layer but the head, named on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from transformers import Phi3Config, Phi3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from glassloop.cli.plan import main as plan
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


def test_it_is_the_default_where_llama_s_names_do_not_exist(
    run_of, tiny_phi3: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(
        model={"id": str(tiny_phi3), "quantization": "none"}, execution={"precision": "fp32"}
    )
    names = {"o_proj", "qkv_proj", "gate_up_proj", "down_proj"}
    assert set(run.config.lora.targets) == names
    assert not any("have no adapter" in line for line in run.header)
    run.close()
    words = ["--rows", "40", f"model.id={tiny_phi3}", "data.source=scam"]
    assert plan(words) == 0
    assert "r = 16 x (in + out) of all-linear" in capsys.readouterr().out


def test_llama_s_names_are_refused_if_they_were_asked_for(run_of, tiny_phi3: Path) -> None:
    with pytest.raises(ConfigError, match="all-linear already has every layer"):
        parse(["lora.targets=all-linear,q_proj"])
    with pytest.raises(ValueError, match="Name those, or set"):
        run_of(
            model={"id": str(tiny_phi3), "quantization": "none"},
            lora={"targets": ["q_proj", "v_proj"]},
        )


def test_linear_weights_without_an_adapter_are_counted_in_header_and_plan(
    run_of, tiny_phi3: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """qkv_proj 64 x 128 and down_proj 128 x 64 of 4 layers' kinds, in 2 layers."""
    targets = ["o_proj", "gate_up_proj"]
    run = run_of(
        model={"id": str(tiny_phi3), "quantization": "none"},
        lora={"targets": targets},
        execution={"precision": "fp32"},
    )
    total = 2 * (64 * 128 + 64 * 64 + 64 * 256 + 128 * 64)
    said = f"{2 * 2 * 64 * 128:,} of {total:,} linear weights (44%) have no adapter: "
    said += "qkv_proj, down_proj"
    assert any(said in line for line in run.header), run.header
    run.close()
    words = ["--rows", "40", f"model.id={tiny_phi3}", "data.source=scam"]
    assert plan([*words, f"lora.targets={','.join(targets)}"]) == 0
    assert said in " ".join(capsys.readouterr().out.split())


def test_a_plan_refuses_what_its_model_does_not_have(tiny_phi3: Path, tmp_path: Path) -> None:
    """As a run of it does, by the same words."""
    words = ["--rows", "40", f"model.id={tiny_phi3}", "data.source=scam"]
    with pytest.raises(ValueError, match=r"rank_pattern\.q_proj names no layer .*all-linear"):
        plan([*words, "lora.rank_pattern.q_proj=4"])
    assert plan([*words, "lora.alpha_pattern.layers.1.mlp.gate_up_proj=4"]) == 0
    with pytest.raises(ValueError, match=r"indices = 512: the embedding has 512 rows"):
        plan([*words, "lora.trainable_token_indices=511,512"])
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    words[2] = f"model.id={tmp_path}"
    with pytest.raises(ValueError, match=r"engine = fused: .*'mixtral'.*engine=peft"):
        plan([*words, "execution.engine=fused"])


@pytest.mark.parametrize("dense", [[], [1]])
def test_of_a_mixture_of_experts_attention_trains_by_default(
    run_of, tmp_path: Path, tiny_tokenizer, dense: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether or not some layers are dense; the header counts what has no adapter."""
    sizes = dict(vocab_size=512, hidden_size=64, intermediate_size=128, moe_intermediate_size=64)
    heads = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    experts = dict(num_experts=4, num_experts_per_tok=2, mlp_only_layers=dense)
    config = Qwen3MoeConfig(**sizes, **heads, **experts, pad_token_id=0)
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "moe")
    tiny_tokenizer.save_pretrained(tmp_path / "moe")
    run = run_of(model={"id": str(tmp_path / "moe")}, execution={"precision": "fp32"})
    assert set(run.config.lora.targets) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    weights = (2 - len(dense)) * 4 * 3 * 64 * 64
    assert any("have no adapter" in line and "experts" in line for line in run.header)
    (line,) = [line for line in run.header if line.split()[:2] == ["quantised", "experts"]]
    assert f" {weights:,} " in line and "uint8" in line
    run.close()
    assert plan(["--rows", "40", f"model.id={tmp_path / 'moe'}", "data.source=scam"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"its {weights:,} weights of experts are" in said
    assert "weights without an adapter, or not in 4 bits: a run's header counts them" in said
