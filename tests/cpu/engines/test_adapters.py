"""LoRA adapters: fresh, loaded, saved, and refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from glassloop.base import quantised as base_cache
from glassloop.config import LoraConfig
from glassloop.config.arguments import ConfigError, parse
from glassloop.engines.peft import PeftEngine

CPU = torch.device("cpu")
EngineOf = Callable[..., PeftEngine]


def randomise_b(engine: PeftEngine, seed: int = 1) -> None:
    """Give B values.

    A's gradient is then not zero, and the adapters take part in the output.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in engine.hf.named_parameters():
        if "lora_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.05)


def test_fresh_adapters_follow_the_seed_alone(engine_of: EngineOf, tiny_llama: Path) -> None:
    torch.manual_seed(1)
    one = dict(engine_of(tiny_llama, seed=5).named_parameters())
    torch.manual_seed(2)
    same = dict(engine_of(tiny_llama, seed=5).named_parameters())
    other = dict(engine_of(tiny_llama, seed=6).named_parameters())
    a = [name for name in one if "lora_A" in name]
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in a)
    assert not torch.equal(one[a[0]], one[a[1]][: one[a[0]].shape[0]])
    assert all(p.abs().max() == 0 for name, p in one.items() if "lora_B" in name)
    bound = 1 / one[a[0]].shape[1] ** 0.5  # Kaiming uniform with a = sqrt 5
    assert 0.9 * bound < float(one[a[0]].detach().abs().max()) <= bound


def test_scale_of_the_adapter_is_alpha_over_r(engine_of: EngineOf, tiny_llama: Path) -> None:
    engine = engine_of(tiny_llama, lora=LoraConfig(r=4, alpha=6, targets=("q_proj",)))
    randomise_b(engine)
    layer = engine.hf.get_base_model().get_decoder().layers[0].self_attn.q_proj  # type: ignore[operator]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 64)
    expected = F.linear(x, layer.base_layer.weight + 6 / 4 * b @ a)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


# --- what it refuses


@pytest.mark.skipif(find_spec("triton") is None, reason="the fused engine needs triton")
def test_rslora_scales_by_the_root_of_r_in_every_engine_and_on_disk(
    engine_of: EngineOf, tiny_llama: Path, tmp_path: Path
) -> None:
    from family_models import adapters_of, fused_of, gradient, passes

    lora = LoraConfig(r=16, alpha=6, rslora=True)
    assert lora.scale == 1.5 and lora.scale_in_words == "6/sqrt(16)"
    engine = engine_of(tiny_llama, lora=lora, quantization="nf4")
    adapters = adapters_of(engine)
    layer = engine.hf.get_base_model().get_decoder().layers[0].self_attn.q_proj  # type: ignore[operator]
    assert layer.scaling["default"] == 1.5
    wanted, slope = gradient(engine, adapters, passes(packed=False))
    found, ours = gradient(fused_of(engine), adapters, passes(packed=True))
    assert found == pytest.approx(wanted, rel=1e-5)
    assert float((ours - slope).norm() / slope.norm()) < 1e-5
    engine.hf.save_pretrained(tmp_path)  # type: ignore[operator]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_rslora"] is True
    engine_of(tiny_llama, lora=lora, init_adapter=str(tmp_path))
    with pytest.raises(ValueError, match=r"lora\.rslora is True in the adapter, False in the"):
        engine_of(tiny_llama, lora=LoraConfig(r=16, alpha=6), init_adapter=str(tmp_path))
    with pytest.raises(ConfigError, match=r"lora\.rslora = True.*unsloth|unsloth.*rslora"):
        parse(["lora.rslora=true", "execution.engine=unsloth"])


def test_unknown_targets_are_refused_with_the_names_that_exist(
    engine_of: EngineOf, tiny_llama: Path
) -> None:
    with pytest.raises(
        ValueError,
        match=r"lora.targets = c_attn: LlamaForCausalLM has no such.*k_proj, v_proj, o_proj",
    ):
        engine_of(tiny_llama, lora=LoraConfig(targets=("q_proj", "c_attn")))
    with pytest.raises(ValueError, match=r"lora.targets = lm_head: "):
        engine_of(tiny_llama, lora=LoraConfig(targets=("lm_head",)))


def saved_adapter(engine_of: EngineOf, folder: Path, to: Path, **settings: object) -> Path:
    engine = engine_of(folder, **settings)  # type: ignore[arg-type]
    randomise_b(engine, seed=9)
    engine.hf.save_pretrained(to, save_embedding_layers=False)  # type: ignore[operator]
    return to


def test_init_adapter_starts_from_its_weights(
    engine_of: EngineOf, tiny_llama: Path, tmp_path: Path
) -> None:
    adapter = saved_adapter(engine_of, tiny_llama, tmp_path, seed=3)
    engine = engine_of(tiny_llama, init_adapter=str(adapter), quantization="nf4", precision="bf16")
    stranger = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), str(adapter)
    )
    theirs = {n: p for n, p in stranger.named_parameters() if "lora_" in n}
    ours = {n: p for n, p in engine.hf.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == torch.float32 for n in ours)


def test_saved_adapter_gives_the_same_logits_elsewhere(
    engine_of: EngineOf, tiny_llama: Path, tmp_path: Path
) -> None:
    engine = engine_of(tiny_llama)
    randomise_b(engine)
    engine.hf.save_pretrained(tmp_path, save_embedding_layers=False)  # type: ignore[operator]
    stranger = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), str(tmp_path)
    ).eval()
    ids = torch.tensor([[1, 7, 8, 9]])
    assert torch.equal(stranger(ids).logits, engine.eval().hf(ids).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 8}, "lora.r is 8 in the adapter, 4 in the config"),
        ({"lora_alpha": 16}, "lora.alpha is 16 in the adapter, 8.0 in the config"),
        ({"target_modules": ["q_proj"]}, r"lora.targets is \['q_proj'\] in the adapter"),
        (
            {"base_model_name_or_path": "meta/other"},
            "it was trained on meta/other, model.id gives /",
        ),
        ({"use_rslora": True}, "lora.rslora is True in the adapter, False in the config"),
        ({"use_dora": True, "r": 2}, "lora.r is 2 .*; use_dora is True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"peft_type": "LOHA"}, "peft_type is LOHA, only LORA"),
        ({"target_modules": 5}, r"lora.targets is \['5'\] in the adapter"),
        ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens is \[1, 2\], not trained"),
        ({"use_qalora": True}, "use_qalora is True, not trained here"),
        ({"use_of_tomorrow": {"a": 1}}, "use_of_tomorrow is {'a': 1}, not trained here"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is pissa.*changes the base"),
    ],
)
def test_init_adapter_that_differs_is_refused_by_field(
    engine_of: EngineOf, tiny_llama: Path, tmp_path: Path, change: dict, message: str
) -> None:
    adapter = saved_adapter(engine_of, tiny_llama, tmp_path)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | change))
    with pytest.raises(ValueError, match=rf"model.init_adapter = .*{message}"):
        engine_of(tiny_llama, init_adapter=str(adapter))


def test_init_adapter_that_is_damaged_or_missing_is_refused(
    engine_of: EngineOf, tiny_llama: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(
        ValueError, match=r"model.init_adapter = /nowhere has no adapter_config.json"
    ):
        engine_of(tiny_llama, init_adapter="/nowhere")
    weights = saved_adapter(engine_of, tiny_llama, tmp_path) / "adapter_model.safetensors"
    whole = load_file(weights)
    name = next(iter(whole))
    for broken in (
        {n: t for n, t in whole.items() if n != name},
        whole | {name: whole[name][:, :1].clone()},
        whole | {"x": torch.ones(1)},
    ):
        save_file(broken, weights)
        with pytest.raises(ValueError, match="1 tensors are missing, unknown or of another shape"):
            engine_of(tiny_llama, init_adapter=str(tmp_path))
    weights.write_bytes(b"torn")
    with pytest.raises(ValueError, match="its weights cannot be read"):
        engine_of(tiny_llama, init_adapter=str(tmp_path))
    weights.unlink()
    with pytest.raises(ValueError, match=r"model.init_adapter"):
        engine_of(tiny_llama, init_adapter=str(tmp_path))


def test_init_adapter_with_numbers_that_are_not_finite_is_refused(
    engine_of: EngineOf, tiny_llama: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    weights = saved_adapter(engine_of, tiny_llama, tmp_path) / "adapter_model.safetensors"
    whole = load_file(weights)
    name = list(whole)[3]
    for odd in (whole[name].clone().fill_(torch.nan), whole[name].to(torch.int8)):
        save_file(whole | {name: odd}, weights)
        with pytest.raises(ValueError, match=f"{name} holds values that are no finite numbers"):
            engine_of(tiny_llama, init_adapter=str(tmp_path))


@pytest.mark.timeout(60)
def test_init_adapter_of_pipes_or_without_end_is_refused_at_once(
    engine_of: EngineOf, tiny_llama: Path, tmp_path: Path
) -> None:
    adapter = saved_adapter(engine_of, tiny_llama, tmp_path)
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(ValueError, match=r"has no adapter_model.safetensors"):
        engine_of(tiny_llama, init_adapter=str(adapter))
    with open(config, "r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"adapter_config.json has 1,099,511,627,776 bytes"):
        engine_of(tiny_llama, init_adapter=str(adapter))
    config.unlink()
    os.mkfifo(config)
    with pytest.raises(ValueError, match=r"has no adapter_config.json"):
        engine_of(tiny_llama, init_adapter=str(adapter))


COMMON = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}


def test_a_model_with_dense_layers_and_experts_is_refused_with_targets_that_fit(
    engine_of: EngineOf, tmp_path: Path
) -> None:
    config = Qwen3MoeConfig(
        **COMMON,
        moe_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[0],
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"gate_proj, up_proj, down_proj: PEFT takes these for experts of Qwen"
    ) as told:
        engine_of(tmp_path)
    cure = str(told.value).rpartition("lora.targets=")[2].partition(";")[0].split(",")
    assert cure == ["q_proj", "k_proj", "v_proj", "o_proj"]
    engine = engine_of(tmp_path, lora=LoraConfig(r=4, alpha=8, targets=tuple(cure)))
    assert len([n for n, p in engine.hf.named_parameters() if p.requires_grad]) == 2 * 4 * 2


def test_what_peft_refuses_names_the_targets(
    engine_of: EngineOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Qwen3MoeConfig(
        **COMMON,
        moe_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[0],
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"gate_proj: PEFT takes this for experts of Qwen"):
        engine_of(tmp_path, lora=LoraConfig(r=4, alpha=8, targets=("gate_proj",)))

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("not such layers")

    monkeypatch.setattr("peft.get_peft_model", refuse)
    with pytest.raises(
        ValueError, match=r"targets = q_proj: PEFT cannot adapt them in Qwen.*not such"
    ):
        engine_of(tmp_path, lora=LoraConfig(r=4, alpha=8, targets=("q_proj",)))


def test_adapter_config_names_base_and_commit(
    engine_of: EngineOf, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is the hub's, not a cache folder's.

    Also when the base was read from the quantised copy.
    """
    commit = "a" * 40
    real = base_cache.resolve_source
    monkeypatch.setattr(
        base_cache,
        "resolve_source",
        lambda model: replace(real(model), name="owner/tiny", commit=commit),
    )
    for _ in range(2):
        engine = engine_of(tiny_llama, quantization="nf4")
    assert engine.report.from_cache
    engine.hf.save_pretrained(tmp_path, save_embedding_layers=False)  # type: ignore[operator]
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("owner/tiny", commit)
    assert (saved["r"], saved["lora_alpha"], saved["bias"], saved["task_type"]) == (
        4,
        8,
        "none",
        "CAUSAL_LM",
    )
