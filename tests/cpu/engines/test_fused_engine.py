"""fused against the reference: the same sums and gradients.

In fp32 on a CPU, over the same NF4 weights.
"""

from __future__ import annotations

import gc
import importlib.util

import pytest
import torch
from fused_engines import TARGETS, adapters_of, fused_of, gradient, rows_of
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from glassloop.config import LoraConfig
from glassloop.data.batches import build_pass
from glassloop.data.rows import Row
from glassloop.formula.optim import FlatAdapters
from glassloop.predict.tiers import HOSTS, Tiers

if importlib.util.find_spec("triton") is not None:
    TIERS = [
        Tiers(kept, host, held)
        for kept, held in ((0, 0), (1, 2), (2, 1), (2, 0), (0, 0))
        for host in HOSTS
    ]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton, which has no build for this system",
)


@pytest.fixture(params=["tiny_llama", "tiny_qwen2", "biased_llama"])
def model(request: pytest.FixtureRequest):
    """Models without biases, with some and a tied head, and with all."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def biased_llama(tmp_path_factory, tiny_llama):
    config = LlamaConfig.from_pretrained(tiny_llama, attention_bias=True, mlp_bias=True)
    torch.manual_seed(1)
    made = LlamaForCausalLM(config)
    for name, parameter in made.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("biased-llama")
    made.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "v_proj"), ("o_proj", "up_proj")])
@pytest.mark.parametrize("packed", [False, True])
def test_sums_and_gradient_are_the_reference_engines(engine_of, model, targets, packed):
    lora = LoraConfig(r=4, alpha=8, targets=targets)
    reference = engine_of(model, quantization="nf4", lora=lora)
    before = adapters_of(reference)
    passes = [
        build_pass(rows_of(*lengths), packed=packed, pad_id=0, device=torch.device("cpu"))
        for lengths in ((9, 17, 5, 30), (4,))
    ]
    wanted, slope = gradient(reference, before, passes)
    engine = fused_of(engine_of(model, quantization="nf4", lora=lora))
    adapters = adapters_of(engine)
    for tiers in TIERS:
        engine.use_tiers(tiers)
        found, ours = gradient(engine, adapters, passes)
        for (sum_a, rows_a), (sum_b, rows_b) in zip(wanted, found, strict=True):
            assert sum_a == pytest.approx(sum_b, rel=1e-6)
            assert torch.allclose(rows_a, rows_b, rtol=1e-6)
        assert float((ours - slope).norm() / slope.norm()) <= 1e-6
    for name, place in adapters.slices.items():
        assert float((place.of(ours) - place.of(slope)).norm() / place.of(slope).norm()) <= 5e-6, (
            name
        )
    with torch.no_grad():
        assert engine(passes[0])[0].item() == pytest.approx(wanted[0][0], rel=1e-6)


def test_without_its_adapters_it_is_the_base_and_with_them_what_it_was(engine_of, model):
    engine = fused_of(engine_of(model, quantization="nf4"))
    reference = engine_of(model, quantization="nf4")  # fresh: B is 0
    adapters_of(engine)
    p = build_pass(rows_of(12, 7), packed=False, pad_id=0, device=torch.device("cpu"))
    for held in (0, 2):
        engine.use_tiers(Tiers(2, host="nothing", held=held))
        with torch.no_grad():
            before = engine(p)[0].item()
            with engine.hf.disable_adapter():
                base = engine(p)[0].item()
            assert base == pytest.approx(reference(p)[0].item(), rel=1e-6)
            assert engine(p)[0].item() == before != base


def test_a_pass_without_labels_adds_nothing(engine_of, tiny_llama):
    engine = fused_of(engine_of(tiny_llama, quantization="nf4"))
    adapters = adapters_of(engine)
    bare = [Row("bare", (5, 6, 7), (False,) * 3), Row("too", (8, 9), (False,) * 2)]
    p = build_pass(bare, packed=True, pad_id=0, device=torch.device("cpu"))
    found, slope = gradient(engine, adapters, [p])
    assert found[0][0] == 0 and found[0][1].tolist() == [0, 0] and not slope.any()


def test_every_tier_gives_the_same_bits(engine_of, tiny_llama):
    engine = fused_of(engine_of(tiny_llama, quantization="nf4"))
    adapters = adapters_of(engine)
    p = build_pass(rows_of(12, 7), packed=True, pad_id=0, device=torch.device("cpu"))
    grads = []
    for tiers in TIERS:
        engine.use_tiers(tiers)
        grads.append(gradient(engine, adapters, [p, p])[1])
    assert all(torch.equal(grads[0], one) for one in grads[1:])


def test_weights_that_are_no_longer_held_are_freed(engine_of, tiny_llama):
    import weakref

    engine = fused_of(engine_of(tiny_llama, quantization="nf4"))
    adapters, p = (
        adapters_of(engine),
        build_pass(rows_of(12), packed=False, pad_id=0, device=torch.device("cpu")),
    )
    engine.use_tiers(Tiers(2, host="nothing", held=2))
    gradient(engine, adapters, [p])
    held = [weakref.ref(linear.held) for layer in engine.layers for linear in layer.linears]
    engine.use_tiers(Tiers(2, host="nothing"))
    gc.collect()
    assert not any(one() is not None for one in held)


def test_adapters_that_moved_are_seen_and_so_are_buffers_that_were_replaced(engine_of, tiny_llama):
    """An optimizer writes in place; a second FlatAdapters moves data.

    Gradients move too.
    """
    engine = fused_of(engine_of(tiny_llama, quantization="nf4"))
    adapters = adapters_of(engine)
    p = build_pass(rows_of(12), packed=False, pad_id=0, device=torch.device("cpu"))
    first, _ = gradient(engine, adapters, [p])
    adapters.flat.data.mul_(3)
    second, _ = gradient(engine, adapters, [p])
    assert first[0][0] != second[0][0]
    other = FlatAdapters(engine.hf.named_parameters())
    third, slope = gradient(engine, other, [p])
    assert third[0][0] == second[0][0] and float(slope.norm()) > 0


def test_the_peft_model_over_the_same_storage_still_answers_as_before(engine_of, tiny_llama):
    reference = engine_of(tiny_llama, quantization="nf4")
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        before = reference.hf(input_ids=ids).logits
        engine = fused_of(reference)
        assert torch.equal(engine.hf(input_ids=ids).logits, before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu', fused knows 'silu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_type = 'dynamic'"),
        ({"model_type": "gpt2"}, "model_type = 'gpt2', fused knows 'llama', 'qwen2'"),
        ({"pretraining_tp": 4}, "pretraining_tp = 4, fused knows 1"),
    ],
)
def test_a_config_that_is_not_carried_out_is_refused_by_its_field(
    engine_of, tiny_llama, change, said
):
    engine = engine_of(tiny_llama, quantization="nf4")
    for name, value in change.items():
        setattr(engine.hf.get_base_model().config, name, value)
    with pytest.raises(ValueError, match=said) as refused:
        fused_of(engine)
    assert "execution.engine=peft" in str(refused.value)


def test_weights_that_are_not_nf4_and_adapters_with_dropout_are_refused(engine_of, tiny_llama):
    with pytest.raises(
        ValueError, match=r"layer 0 self_attn.q_proj is not in NF4: set model.quantization=nf4"
    ):
        fused_of(engine_of(tiny_llama))
    with pytest.raises(ValueError, match=r"lora.dropout = 0.1 is not supported"):
        fused_of(
            engine_of(tiny_llama, quantization="nf4", lora=LoraConfig(r=4, alpha=8, dropout=0.1))
        )


def test_a_model_with_code_of_its_own_is_refused(engine_of, tiny_llama):
    engine = engine_of(tiny_llama, quantization="nf4")
    base = engine.hf.get_base_model()
    base.__class__ = type("Own", (type(base),), {"__module__": "transformers_modules.own"})
    with pytest.raises(ValueError, match=r"brings Python code of its own.*execution.engine=peft"):
        fused_of(engine)
