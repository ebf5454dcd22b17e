"""The engine: what it computes, what it trains, and what it refuses."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from glassloop import base_cache
from glassloop.batches import build_pass
from glassloop.config import LoraConfig, ModelConfig
from glassloop.model import PeftEngine, build_engine, load_tokenizer
from glassloop.model_checks import (
    audit_table,
    base_checksum,
    check_devices,
    check_dtypes,
    check_plain_head,
    check_sharding,
    dtype_audit,
)
from glassloop.rows import Pass, Row
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

CPU = torch.device("cpu")
LORA = LoraConfig(r=4, alpha=8)


def engine_of(
    folder: Path, *, lora: LoraConfig = LORA, precision: str = "fp32", checkpointing: bool = False, seed: int = 0, **model: object
) -> PeftEngine:
    config = ModelConfig(id=str(folder), **{"quantization": "none", **model})  # type: ignore[arg-type]
    return build_engine(
        config, lora, precision=precision, checkpointing=checkpointing, seed=seed, device=CPU, first=contextlib.nullcontext
    )


def rows_of(*lengths: int, seed: int = 0) -> list[Row]:
    """Random rows; the last two thirds of each are supervised."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Row(
            f"r{i}",
            tuple(torch.randint(6, 512, (length,), generator=generator).tolist()),
            tuple(place >= max(1, length // 3) for place in range(length)),
        )
        for i, length in enumerate(lengths)
    ]


def pass_of(rows: list[Row], packed: bool = False) -> Pass:
    return build_pass(rows, packed=packed, pad_id=0, device=CPU)


def randomise_b(engine: PeftEngine, seed: int = 1) -> None:
    """Give B values, so that A's gradient is not zero and the adapters take part in the output."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in engine.hf.named_parameters():
        if "lora_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.05)


def gradient(engine: PeftEngine, p: Pass) -> torch.Tensor:
    """All adapters' gradients of one pass, flat."""
    engine.zero_grad()
    loss_sum, _ = engine(p)
    loss_sum.backward()
    return torch.cat([q.grad.flatten() for q in engine.parameters() if q.requires_grad])  # type: ignore[union-attr]


@pytest.fixture(params=["tiny_llama", "tiny_qwen2"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


# --- what it computes


def test_loss_sums_are_the_models_own_loss(folder: Path) -> None:
    """transformers' loss on each row alone, times its supervised tokens, is the row's loss sum; the total is their sum."""
    engine, rows = engine_of(folder), rows_of(13, 7, 22)
    randomise_b(engine)
    with torch.no_grad():
        loss_sum, row_loss_sums = engine(pass_of(rows))
        expected = []
        for row in rows:
            ids = torch.tensor([row.input_ids])
            labels = torch.where(torch.tensor([row.supervised]), ids, -100)
            expected.append(engine.hf(input_ids=ids, labels=labels).loss * row.supervised_tokens)
    assert loss_sum.dtype == row_loss_sums.dtype == torch.float32
    torch.testing.assert_close(row_loss_sums, torch.stack(expected), rtol=1e-6, atol=0)
    torch.testing.assert_close(loss_sum, sum(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_pass_equals_padded_pass(folder: Path, attention: str) -> None:
    engine, rows = engine_of(folder, attention=attention), rows_of(13, 1, 7, 22)
    randomise_b(engine)
    padded, packed = pass_of(rows), pass_of(rows, packed=True)
    torch.testing.assert_close(engine(packed)[1], engine(padded)[1], rtol=1e-6, atol=1e-6)
    one, other = gradient(engine, padded), gradient(engine, packed)
    assert float((one - other).norm() / one.norm()) < 1e-6


def test_packed_rows_keep_a_sliding_window(tmp_path: Path) -> None:
    """Layers that see only the last 4 places do so in a packed pass too."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        sliding_window=4, initializer_range=0.1,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path)
    engine, rows = engine_of(tmp_path), rows_of(13, 9)
    torch.testing.assert_close(engine(pass_of(rows, packed=True))[1], engine(pass_of(rows))[1], rtol=1e-6, atol=1e-6)
    wide = engine_of(tmp_path)
    wide.hf.config.sliding_window = None  # type: ignore[union-attr]
    assert not torch.allclose(wide(pass_of(rows))[1], engine(pass_of(rows))[1], rtol=1e-4), "the window had no effect"


def test_padding_changes_no_row(folder: Path) -> None:
    engine, rows = engine_of(folder), rows_of(9, 30)
    alone, beside = engine(pass_of(rows[:1]))[1], engine(pass_of(rows))[1]
    torch.testing.assert_close(alone[0], beside[0], rtol=1e-6, atol=0)


def test_padded_pass_leaves_attention_without_a_mask(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No mask and is_causal: the form for which scaled_dot_product_attention may take its flash kernel."""
    seen = []
    real = F.scaled_dot_product_attention

    def spy(*args: object, attn_mask: torch.Tensor | None = None, is_causal: bool = False, **rest: object) -> torch.Tensor:
        seen.append((attn_mask, is_causal))
        return real(*args, attn_mask=attn_mask, is_causal=is_causal, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    engine_of(tiny_llama)(pass_of(rows_of(5, 9)))
    assert len(seen) > 2
    assert all(mask is None and causal for mask, causal in seen[-2:])


def test_packed_is_refused_where_rows_see_each_other(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that takes position_ids but attends over the whole pass is found out before it trains."""
    engine = engine_of(tiny_llama)
    decoder = engine.hf.get_base_model().get_decoder()  # type: ignore[operator]
    real = decoder.forward

    def leaky(*args: object, position_ids: torch.Tensor | None = None, **rest: object) -> object:
        mask = None if position_ids is None else torch.ones(1, 1, *[position_ids.shape[1]] * 2, dtype=torch.bool).tril()
        return real(*args, position_ids=position_ids, attention_mask=mask, **rest)

    monkeypatch.setattr(decoder, "forward", leaky)
    with pytest.raises(ValueError, match=r"execution.layout = packed: LlamaForCausalLM .*execution.layout=literal"):
        engine(pass_of(rows_of(5, 9), packed=True))
    monkeypatch.setattr(decoder, "forward", lambda input_ids, use_cache: None)
    with pytest.raises(ValueError, match=r"takes no position_ids .*execution.layout=literal"):
        engine(pass_of(rows_of(5, 9), packed=True))
    assert engine.training


# --- what it trains


def test_every_adapter_learns_under_checkpointing(folder: Path) -> None:
    """Update 1 gives every B a gradient and no A (B is zero); update 2 gives every A one. Embeddings stay frozen."""
    engine = engine_of(folder, checkpointing=True, quantization="nf4")
    trainable = {name: p for name, p in engine.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trainable)
    assert len(trainable) == 2 * 7 * 2
    batch = pass_of(rows_of(12, 17))
    optimizer = torch.optim.SGD(trainable.values(), lr=0.1)
    for update in (1, 2):
        engine.zero_grad()
        engine(batch)[0].backward()
        for name, p in trainable.items():
            assert p.grad is not None, name
            if "lora_B" in name or update == 2:
                assert p.grad.abs().max() > 0, f"{name} has no gradient at update {update}"
            else:
                assert p.grad.abs().max() == 0, name
        optimizer.step()


def test_checkpointing_recomputes_layers_and_changes_no_gradient(tiny_llama: Path) -> None:
    calls = []
    gradients = []
    for checkpointing in (False, True):
        engine = engine_of(tiny_llama, checkpointing=checkpointing)
        randomise_b(engine)
        count: list[int] = []
        engine.hf.get_base_model().get_decoder().layers[0].self_attn.register_forward_hook(lambda *_, count=count: count.append(1))  # type: ignore
        gradients.append(gradient(engine, pass_of(rows_of(12, 17))))
        calls.append(len(count))
    assert calls == [1, 2]
    assert torch.equal(*gradients)


def test_no_gradient_is_computed_at_the_embeddings(tiny_llama: Path) -> None:
    """Non-reentrant checkpointing needs none; PEFT adds one when it sees checkpointing already on."""
    engine = engine_of(tiny_llama, checkpointing=True)
    seen = []
    embedding = engine.hf.get_base_model().get_input_embeddings()  # type: ignore[operator]
    embedding.register_forward_hook(lambda _m, _i, output: seen.append(output.requires_grad))
    engine(pass_of(rows_of(12)))
    assert seen == [False]


def test_generating_between_two_updates_changes_nothing(tiny_llama: Path) -> None:
    """Bit for bit, on a 4-bit base."""
    engine, batch = engine_of(tiny_llama, quantization="nf4"), pass_of(rows_of(12, 17))
    randomise_b(engine)
    before = gradient(engine, batch)
    engine.eval()
    with torch.no_grad():
        engine.hf.generate(input_ids=torch.tensor([[1, 7, 8]]), max_new_tokens=3, do_sample=False)  # type: ignore[operator]
        engine(batch)
    engine.train()
    assert torch.equal(before, gradient(engine, batch))


def test_generating_would_change_gradients_without_the_cure(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault that the test before guards against is real on this CPU; where it is not, the cure cannot be seen to work."""
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16: bitsandbytes repacks nothing")
    monkeypatch.setattr(base_cache, "prepare_4bit", lambda hf, dtype: None)
    engine, batch = engine_of(tiny_llama, quantization="nf4"), pass_of(rows_of(12, 17))
    randomise_b(engine)
    engine.eval()  # the plain-head check has repacked all layers by now
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        engine.train()
        broken = gradient(engine, batch)
    monkeypatch.undo()
    whole = engine_of(tiny_llama, quantization="nf4")
    randomise_b(whole)
    assert float((gradient(whole, batch) - broken).norm() / broken.norm()) > 0.01


def test_fresh_adapters_follow_the_seed_alone(tiny_llama: Path) -> None:
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


def test_scale_of_the_adapter_is_alpha_over_r(tiny_llama: Path) -> None:
    engine = engine_of(tiny_llama, lora=LoraConfig(r=4, alpha=6, targets=("q_proj",)))
    randomise_b(engine)
    layer = engine.hf.get_base_model().get_decoder().layers[0].self_attn.q_proj  # type: ignore[operator]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 64)
    expected = F.linear(x, layer.base_layer.weight + 6 / 4 * b @ a)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_engine_is_unchanged_by_accelerates_prepare(tiny_llama: Path) -> None:
    """prepare_model in evaluation mode adds autocast to forward and moves nothing out of place."""
    engine, batch = engine_of(tiny_llama, quantization="nf4"), pass_of(rows_of(12, 17))
    randomise_b(engine)
    before = gradient(engine, batch)
    parameters = [id(p) for p in engine.parameters()]
    prepared = Accelerator(cpu=True).prepare_model(engine, evaluation_mode=True)
    assert prepared is engine
    assert [id(p) for p in engine.parameters()] == parameters
    assert torch.equal(before, gradient(engine, batch))
    assert base_checksum(engine.hf) == engine.report.checksum


def test_bf16_engine_is_near_fp32_under_autocast(tiny_llama: Path) -> None:
    batch = pass_of(rows_of(12, 17))
    exact = engine_of(tiny_llama)
    rounded = engine_of(tiny_llama, precision="bf16", checkpointing=True)
    for engine in (exact, rounded):
        randomise_b(engine)
    truth = gradient(exact, batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss_sum, _ = rounded(batch)
    loss_sum.backward()
    got = torch.cat([q.grad.flatten() for q in rounded.parameters() if q.requires_grad])  # type: ignore[union-attr]
    assert got.dtype == loss_sum.dtype == torch.float32
    assert float((got - truth).norm() / truth.norm()) < 0.03


def test_ddp_leaves_the_base_alone(tiny_llama: Path) -> None:
    engine = engine_of(tiny_llama, quantization="nf4")
    ignored = set(engine._ddp_params_and_buffers_to_ignore)
    names = {name for name, _ in [*engine.named_parameters(), *engine.named_buffers()]}
    assert ignored < names
    assert names - ignored == {name for name, p in engine.named_parameters() if p.requires_grad}


# --- dtypes, devices, checksums


def test_dtype_audit_counts_every_parameter(folder: Path) -> None:
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
def test_base_has_the_dtype_asked_for(tiny_llama: Path, precision: str) -> None:
    engine = engine_of(tiny_llama, precision=precision, quantization="nf4")
    wanted = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[precision]
    for group in dtype_audit(engine.hf):
        if group.kind.startswith("adapter"):
            assert group.dtype == "float32"
        elif not group.kind.startswith("quanti"):
            assert group.dtype == wanted, group
    layer = engine.hf.get_base_model().get_decoder().layers[0].mlp.up_proj.base_layer  # type: ignore[operator]
    assert layer.compute_dtype == base_cache.DTYPES[precision]
    assert layer.support_avx512bf16_for_cpu is False


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_trainables_in_16_bits_are_refused(tiny_llama: Path, precision: str) -> None:
    engine = engine_of(tiny_llama, precision=precision)
    name, parameter = next((n, p) for n, p in engine.hf.named_parameters() if "lora_B" in n)
    parameter.data = parameter.data.to(torch.float16)
    with pytest.raises(ValueError, match=rf"{name} trains in torch.float16, but execution.precision = {precision} needs fp32"):
        check_dtypes(engine.hf, precision)


def test_fp32_copies_of_base_weights_are_refused(tiny_llama: Path) -> None:
    """What prepare_model_for_kbit_training does to embedding and head."""
    engine = engine_of(tiny_llama, precision="bf16", quantization="nf4")
    base = engine.hf.get_base_model()  # type: ignore[operator]
    for layer in base.get_decoder().layers:
        layer.input_layernorm.weight.data = layer.input_layernorm.weight.data.float()
    check_dtypes(engine.hf, "bf16")  # norms may be fp32
    base.get_output_embeddings().weight.data = base.get_output_embeddings().weight.data.float()
    with pytest.raises(ValueError, match=r"lm_head.weight \(head\) is fp32 although execution.precision = bf16"):
        check_dtypes(engine.hf, "bf16")
    check_dtypes(engine.hf, "fp32")


def test_model_on_another_device_is_refused(tiny_llama: Path) -> None:
    engine = engine_of(tiny_llama)
    check_devices(engine.hf, CPU)
    with pytest.raises(ValueError, match="lies on cpu, but this rank owns cuda:1: device_map='auto' splits"):
        check_devices(engine.hf, torch.device("cuda", 1))
    norm = engine.hf.get_base_model().get_decoder().norm  # type: ignore[operator]
    norm.weight = torch.nn.Parameter(norm.weight.to("meta"), requires_grad=False)
    with pytest.raises(ValueError, match="norm.weight lies on meta"):
        check_devices(engine.hf, CPU)


def test_sharding_launch_files_are_refused() -> None:
    for fine in ("DistributedType.MULTI_GPU", "DistributedType.NO", "MULTI_CPU"):
        check_sharding(fine, "nf4")
    with pytest.raises(ValueError, match=r"FSDP .*bnb_4bit_quant_storage=bfloat16 and bf16 adapters .*MULTI_GPU"):
        check_sharding("DistributedType.FSDP", "nf4")
    with pytest.raises(ValueError, match=r"DEEPSPEED with model.quantization = none: every rank holds"):
        check_sharding("DEEPSPEED", "none")


def test_base_checksum_sees_one_changed_byte_in_any_tensor(folder: Path) -> None:
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


def test_base_checksum_sees_two_words_that_changed_places() -> None:
    module = torch.nn.Linear(64, 1, bias=False)
    clean = base_checksum(module)
    module.weight.data[0, :4] = module.weight.data[0, [2, 3, 0, 1]]
    assert base_checksum(module) != clean


def test_base_checksum_is_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from glassloop import model_checks

    module = torch.nn.Linear(33, 7)
    clean = base_checksum(module)
    monkeypatch.setattr(model_checks, "CHUNK_WORDS", 5)
    assert base_checksum(module) == clean


# --- what it refuses


def test_unknown_targets_are_refused_with_the_names_that_exist(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match=r"lora.targets = c_attn: LlamaForCausalLM has no such.*down_proj, gate_proj, k_proj"):
        engine_of(tiny_llama, lora=LoraConfig(targets=("q_proj", "c_attn")))
    with pytest.raises(ValueError, match=r"lora.targets = lm_head: "):
        engine_of(tiny_llama, lora=LoraConfig(targets=("lm_head",)))


@pytest.mark.parametrize(
    ("field", "value"), [("final_logit_softcapping", 30.0), ("logits_scaling", 8.0), ("logit_scale", 0.0625)]
)
def test_factors_between_head_and_logits_are_refused_by_name(tiny_llama: Path, field: str, value: float) -> None:
    hf = AutoModelForCausalLM.from_pretrained(tiny_llama)
    setattr(hf.config, field, 1.0)
    check_plain_head(hf, CPU)
    setattr(hf.config, field, value)
    with pytest.raises(ValueError, match=f"llama has {field} = {value} between head and logits"):
        check_plain_head(hf, CPU)


def test_factor_without_a_known_name_is_found_by_its_effect(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = AutoModelForCausalLM.from_pretrained(tiny_llama)
    real = hf.forward

    def scaled(*args: object, **rest: object) -> object:
        output = real(*args, **rest)
        output.logits = output.logits * 1.5
        return output

    monkeypatch.setattr(hf, "forward", scaled)
    with pytest.raises(ValueError, match=r"the logits of LlamaForCausalLM are not head\(decoder\(x\)\)"):
        check_plain_head(hf, CPU)


def test_head_with_a_bias_is_part_of_the_loss(tiny_llama: Path) -> None:
    engine, rows = engine_of(tiny_llama), rows_of(9)
    head = engine.hf.get_base_model().get_output_embeddings()  # type: ignore[operator]
    head.bias = torch.nn.Parameter(torch.randn(512), requires_grad=False)
    ids = torch.tensor([rows[0].input_ids])
    labels = torch.where(torch.tensor([rows[0].supervised]), ids, -100)
    expected = engine.hf(input_ids=ids, labels=labels).loss * rows[0].supervised_tokens
    torch.testing.assert_close(engine(pass_of(rows))[0], expected, rtol=1e-6, atol=0)


def test_other_architectures_work_with_their_own_targets(tmp_path: Path) -> None:
    """GPT-2: learned positions, Conv1D instead of Linear, tied head."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=2, n_positions=64)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no such linear layer; it has c_attn, c_fc, c_proj"):
        engine_of(tmp_path)
    for quantization in ("none", "nf4"):
        engine = engine_of(tmp_path, lora=LoraConfig(r=2, alpha=2, targets=("c_attn",)), quantization=quantization, checkpointing=True)
        engine.eval()  # GPT-2 has dropout of its own
        rows = rows_of(9, 5)
        torch.testing.assert_close(engine(pass_of(rows, packed=True))[1], engine(pass_of(rows))[1], rtol=1e-6, atol=1e-5)


def test_model_that_cannot_recompute_its_layers_is_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(ValueError, match=r"execution.checkpointing = True: LlamaForCausalLM .* set it to false"):
        engine_of(tiny_llama, checkpointing=True)


# --- tokenizer and adapters


def test_tokenizer_keeps_its_own_pad_and_borrows_eos_where_it_has_none(tiny_llama: Path, tiny_tokenizer, tmp_path: Path) -> None:
    own = load_tokenizer(ModelConfig(id=str(tiny_llama)))
    assert (own.bos_token_id, own.eos_token_id, own.pad_token_id) == (1, 2, 0)
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    tiny_tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for missing, expected in (("pad_token", None), ("eos_token", "has a tokenizer without an EOS token")):
        settings.pop(missing)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        if expected is None:
            assert load_tokenizer(ModelConfig(id=str(tmp_path))).pad_token_id == 2
        else:
            with pytest.raises(ValueError, match=expected):
                load_tokenizer(ModelConfig(id=str(tmp_path)))


def test_folder_without_a_tokenizer_names_model_id(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    with pytest.raises(ValueError, match=rf"model.id = {tmp_path}"):
        load_tokenizer(ModelConfig(id=str(tmp_path)))


def saved_adapter(folder: Path, to: Path, **settings: object) -> Path:
    engine = engine_of(folder, **settings)  # type: ignore[arg-type]
    randomise_b(engine, seed=9)
    engine.hf.save_pretrained(to, save_embedding_layers=False)  # type: ignore[operator]
    return to


def test_init_adapter_starts_from_its_weights(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = saved_adapter(tiny_llama, tmp_path, seed=3)
    engine = engine_of(tiny_llama, init_adapter=str(adapter), quantization="nf4", precision="bf16")
    stranger = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), str(adapter))
    theirs = {n: p for n, p in stranger.named_parameters() if "lora_" in n}
    ours = {n: p for n, p in engine.hf.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == torch.float32 for n in ours)


def test_saved_adapter_gives_the_same_logits_elsewhere(tiny_llama: Path, tmp_path: Path) -> None:
    engine = engine_of(tiny_llama)
    randomise_b(engine)
    engine.hf.save_pretrained(tmp_path, save_embedding_layers=False)  # type: ignore[operator]
    stranger = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), str(tmp_path)).eval()
    ids = torch.tensor([[1, 7, 8, 9]])
    assert torch.equal(stranger(ids).logits, engine.eval().hf(ids).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 8}, "lora.r is 8 in the adapter, 4 in the config"),
        ({"lora_alpha": 16}, "lora.alpha is 16 in the adapter, 8.0 in the config"),
        ({"target_modules": ["q_proj"]}, r"lora.targets is \['q_proj'\] in the adapter"),
        ({"base_model_name_or_path": "meta/other"}, "it was trained on meta/other, model.id gives /"),
        ({"use_rslora": True}, "use_rslora is True, not trained here"),
        ({"use_dora": True, "r": 2}, "lora.r is 2 .*; use_dora is True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"peft_type": "LOHA"}, "peft_type is LOHA, only LORA"),
    ],
)
def test_init_adapter_that_differs_is_refused_by_field(tiny_llama: Path, tmp_path: Path, change: dict, message: str) -> None:
    adapter = saved_adapter(tiny_llama, tmp_path)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | change))
    with pytest.raises(ValueError, match=rf"model.init_adapter = .*{message}"):
        engine_of(tiny_llama, init_adapter=str(adapter))


def test_init_adapter_that_is_damaged_or_missing_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(ValueError, match=r"model.init_adapter = /nowhere has no adapter_config.json"):
        engine_of(tiny_llama, init_adapter="/nowhere")
    weights = saved_adapter(tiny_llama, tmp_path) / "adapter_model.safetensors"
    whole = load_file(weights)
    name = next(iter(whole))
    for broken in ({n: t for n, t in whole.items() if n != name}, whole | {name: whole[name][:, :1].clone()}, whole | {"x": torch.ones(1)}):
        save_file(broken, weights)
        with pytest.raises(ValueError, match="1 tensors are missing, unknown or of another shape"):
            engine_of(tiny_llama, init_adapter=str(tmp_path))
    weights.write_bytes(b"torn")
    with pytest.raises(ValueError, match="its weights cannot be read"):
        engine_of(tiny_llama, init_adapter=str(tmp_path))
    weights.unlink()
    with pytest.raises(ValueError, match=r"model.init_adapter"):
        engine_of(tiny_llama, init_adapter=str(tmp_path))


def test_adapter_config_names_base_and_commit(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the base was read from the quantised copy: the name is the hub's, not a cache folder's."""
    commit = "a" * 40
    real = base_cache.resolve_source
    monkeypatch.setattr(base_cache, "resolve_source", lambda model: replace(real(model), name="owner/tiny", commit=commit))
    for _ in range(2):
        engine = engine_of(tiny_llama, quantization="nf4")
    assert engine.report.from_cache
    engine.hf.save_pretrained(tmp_path, save_embedding_layers=False)  # type: ignore[operator]
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("owner/tiny", commit)
    assert (saved["r"], saved["lora_alpha"], saved["bias"], saved["task_type"]) == (4, 8, "none", "CAUSAL_LM")
