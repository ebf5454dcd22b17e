"""Mixtures of experts: their weights in NF4, and adapters on them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from trained_runs import finished_run
from transformers import AutoConfig, AutoModelForCausalLM

from glassloop.base.experts import expert_parameters, quantise_experts, shape_of
from glassloop.cli.__main__ import main
from glassloop.config import LoraConfig
from glassloop.config.arguments import ConfigError, parse
from glassloop.use.trained import adapter_weights, open_trained
from train_loop import train, update_once

SIZES = dict(vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=2)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, pad_token_id=0)
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": dict(moe_intermediate_size=32, num_experts=3, num_experts_per_tok=2),
    "mixtral": dict(num_local_experts=3, num_experts_per_tok=2),
    "gpt_oss": dict(num_local_experts=3, num_experts_per_tok=2),
}
WEIGHTS = {kind: 2 * 3 * 3 * 64 * (32 if kind == "qwen3_moe" else 64) for kind in MIXTURES}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer):
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            torch.manual_seed(0)
            config = AutoConfig.for_model(kind, **SIZES, **MIXTURES[kind])
            model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=0.1)
            made[kind] = tmp_path_factory.mktemp(kind)
            model.save_pretrained(made[kind])
            tiny_tokenizer.save_pretrained(made[kind])
        return made[kind]

    return folder


def model_of(folder_of, kind: str) -> dict[str, str]:
    """gpt-oss has no sdpa: its attention has sinks."""
    eager = {"attention": "eager"} if kind == "gpt_oss" else {}
    return {"id": str(folder_of(kind)), **eager}


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_in_nf4_compute_what_their_dequantised_weights_compute(folder_of, kind) -> None:
    """Loss and the gradient of the embedding's output, in fp32."""
    one, two = (
        AutoModelForCausalLM.from_pretrained(folder_of(kind), dtype=torch.float32) for _ in "ab"
    )
    ids = torch.arange(5, 25).unsqueeze(0)
    found = []
    assert quantise_experts(one, double=True, keep=()) == WEIGHTS[kind]
    for _, module, name, weights in expert_parameters(two):
        packed, state = quantize_4bit(
            weights.data, blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        getattr(module, name).data = dequantize_4bit(packed, state)
    for model in (one, two):
        model.requires_grad_(False)
        inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
        loss = model(inputs_embeds=inputs, labels=ids, use_cache=False).loss
        loss.backward()
        found.append((loss.item(), inputs.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert float((found[0][1] - found[1][1]).norm() / found[1][1].norm()) < 1e-5
    shapes = [shape_of(weights) for *_, weights in expert_parameters(one)]
    assert shapes == [weights.shape for *_, weights in expert_parameters(two)]


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_run_counts_them_in_4_bits_and_trains(run_of, folder_of, kind) -> None:
    run = run_of(model=model_of(folder_of, kind), execution={"precision": "bf16"})
    said = "\n".join(run.header)
    (line,) = [line for line in run.header if line.split()[:2] == ["quantised", "experts"]]
    assert line.split()[2:] == [
        *("uint8", "no", "4", f"{WEIGHTS[kind]:,}", f"{WEIGHTS[kind] / 2 / 2**20:.1f}")
    ]
    assert f"{WEIGHTS[kind]:,} experts in" not in said and "have no adapter: " in said
    run.begin()
    first = update_once(run, 1)
    assert first is not None and first.record.loss_nats > 0
    run.close()


@pytest.mark.parametrize("targets", [None, ["all-linear"]])
def test_a_router_gets_no_adapter_though_it_is_a_linear_layer(
    run_of, tmp_path: Path, tiny_tokenizer, targets: list[str] | None
) -> None:
    """PhiMoE's returns what it chose, to which PEFT cannot add."""
    torch.manual_seed(0)
    experts = dict(num_local_experts=3, num_experts_per_tok=2)
    config = AutoConfig.for_model("phimoe", **SIZES, **experts)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "phimoe")
    tiny_tokenizer.save_pretrained(tmp_path / "phimoe")
    lora = {} if targets is None else {"targets": targets}
    run = run_of(model={"id": str(tmp_path / "phimoe")}, lora=lora)
    assert set(run.config.lora.targets) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    run.begin()
    assert update_once(run, 1) is not None
    run.close()


DENSE = dict(moe_intermediate_size=32, num_experts=3, num_experts_per_tok=2, mlp_only_layers=[1])
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PLAIN = ["gate_proj", "up_proj", "down_proj"]
SHARED = [*ATTENTION, *PLAIN, "shared_expert_gate"]


def saved_mixture(kind: str, folder: Path, tokenizer: Any) -> Path:
    """A mixture with layers beside its experts that are named as experts were."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **DENSE, shared_expert_intermediate_size=32)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "names"), [("qwen3_moe", ATTENTION), ("qwen2_moe", SHARED)])
def test_all_linear_of_a_mixture_is_every_layer_that_peft_can_adapt(
    tmp_path: Path, tiny_tokenizer, kind: str, names: list[str]
) -> None:
    """PEFT takes three names of a Qwen3-MoE for its experts, and none of a Qwen2-MoE."""
    folder = saved_mixture(kind, tmp_path / "model", tiny_tokenizer)
    run = finished_run(tmp_path, folder, lora={"targets": ["all-linear"]})
    saved = open_trained(run)
    assert sorted(saved.config.lora.targets) == sorted(names)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    linear = [n for n, one in plain.named_modules() if isinstance(one, torch.nn.Linear)]
    with warnings.catch_warnings(action="error", category=UserWarning):
        peft = PeftModel.from_pretrained(plain, str(saved.checkpoint))
    stranger, weights = dict(peft.named_parameters()), adapter_weights(saved)
    layers = {name.rpartition(".lora_")[0] for name in weights}
    assert len(layers) == sum(name.rpartition(".")[2] in names for name in linear)
    for name, matrix in weights.items():
        assert torch.equal(stranger[name.replace(".weight", ".default.weight")], matrix), name


def test_names_that_peft_takes_for_experts_are_refused_before_weights_are_read(
    run_of, tmp_path: Path, tiny_tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved_mixture("qwen3_moe", tmp_path / "model", tiny_tokenizer)

    def fail(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr("glassloop.engines.build.load_base", fail)
    for targets, said in (
        (["q_proj", "down_proj"], "down_proj: PEFT takes this for experts .*targets=q_proj; "),
        (PLAIN, "up_proj, down_proj: PEFT takes these .*targets=q_proj,k_proj,v_proj,o_proj; "),
    ):
        with pytest.raises(ValueError, match=said):
            run_of(model={"id": str(folder)}, lora={"targets": targets})


PARTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_lora_reaches_experts_and_they_are_counted_saved_and_resumed(
    run_of, folder_of, kind
) -> None:
    lora = {"target_parameters": list(PARTS), "targets": ["q_proj"], "r": 4}
    lora |= {"rank_pattern": {PARTS[1]: 2}}
    run = run_of(
        model=model_of(folder_of, kind),
        lora=lora,
        execution={"precision": "fp32"},
        schedule={"updates": 2, "warmup_updates": 0},
        checkpoint={"every_updates": 1},
    )
    inner = 32 if kind == "qwen3_moe" else 64
    experts = 3 * (4 * (64 + 2 * inner) + 2 * (64 + inner))
    assert run.contract.facts["trainable parameters"] == 2 * (experts + 4 * (64 + 64))
    left = WEIGHTS[kind] + (2 * 3 * (128 + 64) if kind == "gpt_oss" else 0)  # with their biases
    assert any(f"{left:,} experts in float32" in line for line in run.header)
    assert not any("no adapter" in line and "experts" in line for line in run.header)
    before = run.replica.adapters.flat.detach().clone()
    assert train(run) == 0
    run.close()
    ended = run.replica.adapters.flat.detach()
    moved = [
        name
        for name, place in run.replica.adapters.slices.items()
        if ".experts." in name and not torch.equal(place.of(ended), place.of(before))
    ]
    assert len(moved) == 2 * 2 * 2, moved
    checkpoint = run.folder / "checkpoints" / "update_000002"
    plain = AutoModelForCausalLM.from_pretrained(folder_of(kind), dtype=torch.float32)
    stranger = dict(PeftModel.from_pretrained(plain, str(checkpoint)).named_parameters())
    for name, place in run.replica.adapters.slices.items():
        assert torch.equal(stranger[name].detach(), place.of(ended)), name
    from resumed_runs import resumed

    again = resumed(run.folder, "resume.at=1", start=False, close=False)
    assert train(again) == 0
    again.close()
    assert torch.equal(again.replica.adapters.flat.detach(), ended)


def test_one_tensor_of_a_layer_s_experts_may_have_adapters_beside_one_in_4_bits(
    folder_of, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = {"targets": ["q_proj"], "target_parameters": [PARTS[1]]}
    folder = folder_of("qwen3_moe")
    run = finished_run(tmp_path, folder, lora=lora, record={"capture_updates": [2]})
    saved = open_trained(run)
    weights = adapter_weights(saved)
    assert sum(one.numel() for one in weights.values()) == 2 * 4 * (3 * (64 + 32) + 64 + 64)
    own = json.loads((saved.checkpoint / "adapter_config.json").read_text())
    assert own["target_parameters"] == [PARTS[1]]
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stranger = dict(PeftModel.from_pretrained(plain, str(saved.checkpoint)).named_parameters())
    for name, matrix in weights.items():
        assert torch.equal(stranger[name.replace(".weight", ".default.weight")], matrix), name
    assert main(["replay", str(run), "--update", "2"]) == 0
    assert "reproduced bit for bit" in capsys.readouterr().out
    for words, said in (
        (["--base", "dequantised"], "no file holds them so: --base original"),
        ([], "adapters of experts are not merged here"),
    ):
        assert main(["merge", str(run), str(tmp_path / "out"), "--no-table", *words]) == 2
        assert said in capsys.readouterr().err


def test_what_cannot_be_is_refused_by_name(run_of, folder_of, monkeypatch) -> None:
    def fail(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr("glassloop.engines.build.load_base", fail)
    with pytest.raises(ValueError, match=r"parameters = mlp.experts.w1: .*experts.gate_up_proj"):
        run_of(
            model={"id": str(folder_of("mixtral"))}, lora={"target_parameters": ["mlp.experts.w1"]}
        )
    with pytest.raises(ValueError, match=r"It has no experts in one tensor a layer"):
        run_of(lora={"target_parameters": [PARTS[0]]})
    for engine in ("fused", "unsloth"):
        with pytest.raises(ConfigError, match=rf"{engine} and lora\.target_parameters = a.b"):
            parse(["lora.target_parameters=a.b", f"execution.engine={engine}"])
    with pytest.raises(ConfigError, match=r"lora\.dropout = 0\.1 and lora\.target_parameters"):
        parse(["lora.target_parameters=a.b", "lora.dropout=0.1", "execution.engine=peft"])


def test_adapters_on_experts_are_not_merged_here() -> None:
    from glassloop.use.merge.merge import pairs_of

    with pytest.raises(ValueError, match=r"target_parameters = a\.b: .*merge_and_unload"):
        pairs_of({}, LoraConfig(target_parameters=("a.b",)))
