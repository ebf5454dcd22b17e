"""What the reference engine trains, and on which models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft_passes import EngineOf, gradient, pass_of, randomise_b, rows_of
from transformers import GPT2Config, GPT2LMHeadModel

from glassloop.base import reading
from glassloop.base.checksum import base_checksum
from glassloop.base.tokenizer import load_tokenizer
from glassloop.config import LoraConfig, ModelConfig

# --- what it trains


def test_every_adapter_learns_under_checkpointing(engine_of: EngineOf, folder: Path) -> None:
    """Update 1 gives B its gradients, update 2 gives A its own.

    B is zero at first. Embeddings stay frozen.
    """
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


def test_checkpointing_recomputes_layers_and_changes_no_gradient(
    engine_of: EngineOf, tiny_llama: Path
) -> None:
    calls = []
    gradients = []
    for checkpointing in (False, True):
        engine = engine_of(tiny_llama, checkpointing=checkpointing)
        randomise_b(engine)
        count: list[int] = []
        engine.hf.get_base_model().get_decoder().layers[0].self_attn.register_forward_hook(
            lambda *_, count=count: count.append(1)
        )  # type: ignore
        gradients.append(gradient(engine, pass_of(rows_of(12, 17))))
        calls.append(len(count))
    assert calls == [1, 2]
    assert torch.equal(*gradients)


def test_no_gradient_is_computed_at_the_embeddings(engine_of: EngineOf, tiny_llama: Path) -> None:
    """Non-reentrant checkpointing needs none.

    PEFT adds one when it sees checkpointing already on.
    """
    engine = engine_of(tiny_llama, checkpointing=True)
    seen = []
    embedding = engine.hf.get_base_model().get_input_embeddings()  # type: ignore[operator]
    embedding.register_forward_hook(lambda _m, _i, output: seen.append(output.requires_grad))
    engine(pass_of(rows_of(12)))
    assert seen == [False]


def test_generating_between_two_updates_changes_nothing(
    engine_of: EngineOf, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, on a 4-bit base.

    Nor does the forward pass that checks the head while the engine is built.
    """
    batch = pass_of(rows_of(12, 17))
    checked = engine_of(tiny_llama, quantization="nf4")
    randomise_b(checked)
    for check in ("check_plain_head", "check_still"):
        monkeypatch.setattr(f"glassloop.engines.build.{check}", lambda hf, device, model_id: None)
    engine = engine_of(tiny_llama, quantization="nf4")
    randomise_b(engine)
    before = gradient(engine, batch)  # nothing ran without gradient so far
    assert torch.equal(before, gradient(checked, batch))
    engine.eval()
    with torch.no_grad():
        engine.hf.generate(input_ids=torch.tensor([[1, 7, 8]]), max_new_tokens=3, do_sample=False)  # type: ignore[operator]
        engine(batch)
    engine.train()
    assert torch.equal(before, gradient(engine, batch))


def test_generating_would_change_gradients_without_the_cure(
    engine_of: EngineOf, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault is real here, or the cure cannot be seen."""
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16: bitsandbytes repacks nothing")
    monkeypatch.setattr(reading, "prepare_4bit", lambda hf, dtype: None)
    engine, batch = engine_of(tiny_llama, quantization="nf4"), pass_of(rows_of(12, 17))
    randomise_b(engine)
    assert engine.training, "the plain-head check has repacked all layers by now"
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        broken = gradient(engine, batch)
    monkeypatch.undo()
    whole = engine_of(tiny_llama, quantization="nf4")
    randomise_b(whole)
    assert float((gradient(whole, batch) - broken).norm() / broken.norm()) > 0.01


def test_engine_is_unchanged_by_accelerates_prepare(engine_of: EngineOf, tiny_llama: Path) -> None:
    """Evaluation mode adds autocast to forward and moves nothing."""
    engine, batch = engine_of(tiny_llama, quantization="nf4"), pass_of(rows_of(12, 17))
    randomise_b(engine)
    before = gradient(engine, batch)
    parameters = [id(p) for p in engine.parameters()]
    AcceleratorState._reset_state(True)  # another test's precision is not this one's
    prepared = Accelerator(cpu=True).prepare_model(engine, evaluation_mode=True)
    assert prepared is engine
    assert [id(p) for p in engine.parameters()] == parameters
    assert torch.equal(before, gradient(engine, batch))
    assert base_checksum(engine.hf) == engine.report.checksum


def test_bf16_engine_is_near_fp32_under_autocast(engine_of: EngineOf, tiny_llama: Path) -> None:
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


def test_ddp_leaves_the_base_alone(engine_of: EngineOf, tiny_llama: Path) -> None:
    engine = engine_of(tiny_llama, quantization="nf4")
    ignored = set(engine._ddp_params_and_buffers_to_ignore)
    names = {name for name, _ in [*engine.named_parameters(), *engine.named_buffers()]}
    assert ignored < names
    assert names - ignored == {name for name, p in engine.named_parameters() if p.requires_grad}


def test_head_with_a_bias_is_part_of_the_loss(engine_of: EngineOf, tiny_llama: Path) -> None:
    engine, rows = engine_of(tiny_llama), rows_of(9)
    head = engine.hf.get_base_model().get_output_embeddings()  # type: ignore[operator]
    head.bias = torch.nn.Parameter(torch.randn(512), requires_grad=False)
    ids = torch.tensor([rows[0].input_ids])
    labels = torch.where(torch.tensor([rows[0].supervised]), ids, -100)
    expected = engine.hf(input_ids=ids, labels=labels).loss * rows[0].supervised_tokens
    torch.testing.assert_close(engine(pass_of(rows))[0], expected, rtol=1e-6, atol=0)


def test_other_architectures_work_with_their_own_targets(
    engine_of: EngineOf, tmp_path: Path
) -> None:
    """GPT-2: learned positions, Conv1D instead of Linear, tied head."""
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    ).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"GPT2LMHeadModel has no such linear layer\. It has c_attn, c_proj, c_fc"
    ):
        engine_of(tmp_path)
    for quantization in ("none", "nf4"):
        engine = engine_of(
            tmp_path,
            lora=LoraConfig(r=2, alpha=2, targets=("c_attn",)),
            quantization=quantization,
            checkpointing=True,
        )
        engine.eval()  # GPT-2 has dropout of its own
        rows = rows_of(9, 5)
        torch.testing.assert_close(
            engine(pass_of(rows, packed=True))[1], engine(pass_of(rows))[1], rtol=1e-6, atol=1e-5
        )


def test_model_that_cannot_recompute_its_layers_is_refused(
    engine_of: EngineOf, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(
        ValueError, match=r"execution.checkpointing = True: LlamaForCausalLM .* set it to false"
    ):
        engine_of(tiny_llama, checkpointing=True)


# --- tokenizer and adapters


def test_tokenizer_keeps_its_own_pad_and_borrows_eos_where_it_has_none(
    tiny_llama: Path, tiny_tokenizer, tmp_path: Path
) -> None:
    own = load_tokenizer(ModelConfig(id=str(tiny_llama)))
    assert (own.bos_token_id, own.eos_token_id, own.pad_token_id) == (1, 2, 0)
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    tiny_tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for missing, expected in (
        ("pad_token", None),
        ("eos_token", "the tokenizer has no EOS token"),
    ):
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
