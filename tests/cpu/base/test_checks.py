"""Checks of a model before it trains: dtypes, devices, head, base."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from glassloop.base.checks import (
    audit_table,
    check_devices,
    check_dtypes,
    check_plain_head,
    check_token_ids,
    dtype_audit,
)
from glassloop.base.checksum import base_checksum
from glassloop.base.reading import DTYPES
from glassloop.config import LoraConfig
from glassloop.engines.peft import PeftEngine

CPU = torch.device("cpu")
EngineOf = Callable[..., PeftEngine]


@pytest.fixture(params=["tiny_llama", "tiny_qwen2"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


# --- dtypes, devices, checksums


def test_dtype_audit_counts_every_parameter(engine_of: EngineOf, folder: Path) -> None:
    engine = engine_of(folder, precision="bf16", quantization="nf4")
    groups = {(g.kind, g.dtype): g for g in dtype_audit(engine.hf)}
    layers, hidden, inner = 2, 64, 128
    linear = layers * (2 * hidden * hidden + 2 * 32 * hidden + 3 * hidden * inner)
    assert groups["quantised linear", "uint8"].parameters == linear
    assert groups["quantised linear", "uint8"].size_bytes == linear // 2
    assert groups["quantisation scales", "uint8"].size_bytes == linear // 64
    assert groups["embedding", "bfloat16"].parameters == 512 * 64
    assert groups["norm", "bfloat16"].tensors == 5
    assert groups["adapter A", "float32"].trainable
    assert groups["adapter B", "float32"].trainable
    assert not groups["norm", "bfloat16"].trainable
    untied = folder.name.startswith("tiny-llama")
    assert (("head", "bfloat16") in groups) == untied, "a tied head is the embedding, counted once"
    assert (("bias", "bfloat16") in groups) != untied
    total = sum(p.numel() for p in engine.hf.parameters() if p.dtype != torch.uint8) + linear
    assert sum(g.parameters for g in groups.values()) == total
    assert all(g.kind in audit_table(list(groups.values())) for g in groups.values())


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_base_has_the_dtype_asked_for(
    engine_of: EngineOf, tiny_llama: Path, precision: str
) -> None:
    engine = engine_of(tiny_llama, precision=precision, quantization="nf4")
    wanted = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[precision]
    for group in dtype_audit(engine.hf):
        if group.kind.startswith("adapter"):
            assert group.dtype == "float32"
        elif not group.kind.startswith("quanti"):
            assert group.dtype == wanted, group
    layer = engine.hf.get_base_model().get_decoder().layers[0].mlp.up_proj.base_layer  # type: ignore[operator]
    assert layer.compute_dtype == DTYPES[precision]
    assert layer.support_avx512bf16_for_cpu is False


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_trainables_in_16_bits_are_refused(
    engine_of: EngineOf, tiny_llama: Path, precision: str
) -> None:
    engine = engine_of(tiny_llama, precision=precision)
    name, parameter = next((n, p) for n, p in engine.hf.named_parameters() if "lora_B" in n)
    parameter.data = parameter.data.to(torch.float16)
    with pytest.raises(
        ValueError,
        match=rf"{name} trains in torch.float16, but execution.precision = {precision} needs fp32",
    ):
        check_dtypes(engine.hf, precision)


def test_fp32_copies_of_base_weights_are_refused(engine_of: EngineOf, tiny_llama: Path) -> None:
    """prepare_model_for_kbit_training makes them of embedding and head."""
    engine = engine_of(tiny_llama, precision="bf16", quantization="nf4")
    base = engine.hf.get_base_model()  # type: ignore[operator]
    for layer in base.get_decoder().layers:
        layer.input_layernorm.weight.data = layer.input_layernorm.weight.data.float()
    check_dtypes(engine.hf, "bf16")  # norms may be fp32
    base.get_output_embeddings().weight.data = base.get_output_embeddings().weight.data.float()
    with pytest.raises(
        ValueError, match=r"lm_head.weight \(head\) is fp32 although execution.precision = bf16"
    ):
        check_dtypes(engine.hf, "bf16")
    check_dtypes(engine.hf, "fp32")


def test_model_on_another_device_is_refused(engine_of: EngineOf, tiny_llama: Path) -> None:
    engine = engine_of(tiny_llama)
    check_devices(engine.hf, CPU)
    with pytest.raises(
        ValueError, match="lies on cpu, but this rank owns cuda:1: device_map='auto' splits"
    ):
        check_devices(engine.hf, torch.device("cuda", 1))
    norm = engine.hf.get_base_model().get_decoder().norm  # type: ignore[operator]
    norm.weight = torch.nn.Parameter(norm.weight.to("meta"), requires_grad=False)
    with pytest.raises(ValueError, match=r"norm.weight lies on meta"):
        check_devices(engine.hf, CPU)


def test_base_checksum_sees_one_changed_byte_in_any_tensor(
    engine_of: EngineOf, folder: Path
) -> None:
    engine = engine_of(folder, quantization="nf4", precision="bf16")
    clean = base_checksum(engine.hf)
    assert clean == engine.report.checksum, "wrapping in adapters changes it"
    for name, p in engine.hf.named_parameters():
        if "lora_" in name:
            p.data.add_(1)
    assert base_checksum(engine.hf) == clean, "adapters count"
    tensors = [p for n, p in engine.hf.named_parameters() if "lora_" not in n]
    states = [p.quant_state for p in tensors if hasattr(p, "quant_state")]
    tensors += [t for s in states for t in (s.absmax, s.state2.absmax, s.code)]
    sums = {clean}
    for tensor in tensors:
        raw = tensor.data.view(-1).view(torch.uint8)
        for place in {0, raw.numel() // 2, raw.numel() - 1}:
            raw[place] ^= 1
            sums.add(base_checksum(engine.hf))
            raw[place] ^= 1
    assert base_checksum(engine.hf) == clean
    assert len(sums) > 2 * len(tensors), "a changed byte gave a sum that was seen before"


def test_base_checksum_is_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Linear(33, 7)
    clean = base_checksum(module)
    monkeypatch.setattr("glassloop.base.checksum.CHUNK_WORDS", 5)
    assert base_checksum(module) == clean


@pytest.mark.parametrize(
    ("field", "value"),
    [("final_logit_softcapping", 30.0), ("logits_scaling", 8.0), ("logit_scale", 0.0625)],
)
def test_a_factor_that_the_model_does_not_compute_is_found(
    tiny_llama: Path, field: str, value: float
) -> None:
    hf = AutoModelForCausalLM.from_pretrained(tiny_llama)
    hf.lm_head.weight.data *= 20  # a cap of 30 is seen
    setattr(hf.config, field, 1.0)
    check_plain_head(hf, CPU, "org/base")
    setattr(hf.config, field, value)
    with pytest.raises(ValueError, match=r"the logits of LlamaForCausalLM are not head"):
        check_plain_head(hf, CPU, "org/base")


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [("granite", "logits_scaling", 8.0), ("gemma2", "final_logit_softcapping", 2.0)],
)
def test_factors_between_head_and_logits_are_known(
    kind: str, field: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model(kind, **sizes, **heads, pad_token_id=0, **{field: value})
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    hf.get_output_embeddings().weight.data *= 40
    check_plain_head(hf, CPU, "org/base")
    monkeypatch.setattr("glassloop.base.checks.logit_factors", lambda config: (1.0, None))
    with pytest.raises(ValueError, match="are not head"):
        check_plain_head(hf, CPU, "org/base")


def test_factor_without_a_known_name_is_found_by_its_effect(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = AutoModelForCausalLM.from_pretrained(tiny_llama)
    real = hf.forward

    def scaled(*args: object, **rest: object) -> object:
        output = real(*args, **rest)
        output.logits = output.logits * 1.5
        return output

    monkeypatch.setattr(hf, "forward", scaled)
    with pytest.raises(
        ValueError, match=r"the logits of LlamaForCausalLM are not head\(decoder\(x\)\)"
    ):
        check_plain_head(hf, CPU, "org/base")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_with_numbers_that_are_not_finite_is_refused_with_model_and_weight(
    engine_of: EngineOf, tiny_llama: Path, tmp_path: Path, quantization: str, value: float
) -> None:
    hf = AutoModelForCausalLM.from_pretrained(tiny_llama)
    hf.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    hf.save_pretrained(tmp_path / "spoiled")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "spoiled")
    with pytest.raises(ValueError, match="take an undamaged copy of the model") as error:
        engine_of(tmp_path / "spoiled", quantization=quantization, precision="bf16")
    assert (
        f"model.id = {tmp_path / 'spoiled'} holds infinite or NaN numbers in "
        "model.layers.1.mlp.up_proj.weight" in str(error.value)
    )


def test_logits_that_overflow_are_told_from_damaged_weights(tiny_llama: Path) -> None:
    hf = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float16)
    hf.lm_head.weight.data.fill_(6e4)
    with pytest.raises(
        ValueError,
        match=r"model\.id = org/base computes logits .* in float16: "
        r"set execution\.precision=bf16 or fp32",
    ):
        check_plain_head(hf, CPU, "org/base")


def test_a_model_of_patched_classes_is_refused():
    """As unsloth leaves transformers: for what is built next in the process."""
    from glassloop.base.checks import check_unpatched

    class Linear(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), Linear(2, 2))
    check_unpatched(model, "peft")
    Linear.__module__ = "unsloth.models.llama"
    with pytest.raises(
        ValueError,
        match=r"execution.engine = peft: 1 is unsloth.models.llama's.*start a process of its own",
    ):
        check_unpatched(model, "peft")
    Linear.__module__ = __name__
    Linear.forward = lambda self, x: x  # type: ignore[assignment, method-assign]
    Linear.forward.__module__ = "unsloth_zoo.patches"
    with pytest.raises(ValueError, match=r"unsloth_zoo.patches"):
        check_unpatched(model, "fused")


def test_weights_that_nf4_leaves_unquantised_are_counted_and_said(
    engine_of: EngineOf, tmp_path: Path
) -> None:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    sizes = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    experts = dict(moe_intermediate_size=64, shared_expert_intermediate_size=64, num_experts=4)
    config = Qwen2MoeConfig(**sizes, **heads, **experts, num_experts_per_tok=2)
    Qwen2MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    experts = 2 * 4 * 3 * 64 * 64
    lora = LoraConfig(targets=("q_proj",), target_parameters=("experts.down_proj",))
    engine = engine_of(tmp_path, quantization="nf4", precision="bf16", lora=lora)
    groups = {group.kind: group for group in dtype_audit(engine.hf)}
    assert groups["experts"].parameters == experts // 3  # those with an adapter
    assert groups["experts"].dtype == "bfloat16"
    assert groups["quantised experts"].parameters == 2 * experts // 3
    assert groups["quantised experts"].size_bytes == experts // 3
    note, reach = engine.report.notes
    assert "have no adapter: k_proj, v_proj, o_proj" in reach and "experts" in reach
    assert note.startswith("NF4 leaves ") and f"{experts // 3:,} experts in bfloat16" in note


def test_a_token_beyond_the_embedding_is_refused_by_token_id_and_rows(tiny_tokenizer) -> None:
    rows = [("r0", (5, 6)), ("r1", (7, 511))]
    check_token_ids(rows, {"pad": 0}, 512, tiny_tokenizer, "m")
    with pytest.raises(
        ValueError, match=r"token .* of row r1 has id 511, and the embedding has 511"
    ):
        check_token_ids(rows, {"pad": 0}, 511, tiny_tokenizer, "m")
    with pytest.raises(ValueError, match=r"the pad token .* has id 511, and the embedding has 511"):
        check_token_ids(rows[:1], {"pad": 511}, 511, tiny_tokenizer, "m")


@pytest.mark.parametrize("change", ["pad", "template"])
def test_a_run_refuses_tokens_beyond_the_embedding_before_a_weight_is_read(
    run_of, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    from transformers import AutoTokenizer

    from glassloop.loop import replica

    folder = shutil.copytree(tiny_llama, tmp_path / "short")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(512 - len(tokenizer))])
    if change == "pad":
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    else:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
        tokenizer.chat_template = "<|im_start|>" + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(replica, "build_engine", None)
    said = r"'\[PAD\]'" if change == "pad" else r"'<\|im_start\|>' of row \S+"
    with pytest.raises(
        ValueError, match=rf"token {said} has id 512, and the embedding has 512 rows"
    ):
        run_of(model={"id": str(folder)})


def test_a_base_that_comes_quantised_in_16_bits_is_widened_to_fp32(
    engine_of: EngineOf, tiny_llama: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(
        tiny_llama, quantization_config=settings, device_map={"": "cpu"}
    )
    model.save_pretrained(tmp_path)
    engine = engine_of(tmp_path, quantization="nf4", precision="fp32", double_quantization=False)
    dtypes = {group.kind: group.dtype for group in dtype_audit(engine.hf)}
    assert dtypes["embedding"] == dtypes["head"] == dtypes["norm"] == "float32"
