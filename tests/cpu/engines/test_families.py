"""Every family of `fused`: a small odd model of its config against transformers, in fp32.

The loss, and the gradient of every adapter matrix, over the same NF4 weights and several rows.
A description that is wrong in one field is seen.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import (
    BOTH,
    MIXED,
    MODELS,
    SIZES,
    adapters_of,
    drawn,
    fused_of,
    gradient,
    passes,
    rows_of,
    saved_model,
)
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config

from glassloop.config import PROJECTIONS, LoraConfig, ModelConfig
from glassloop.data.batches import build_pass
from glassloop.engines.adapters import linear_names
from glassloop.engines.build import build_engine
from glassloop.plan.described import Described, Kind, Norms
from glassloop.plan.families import FAMILIES, FREE, Unsupported, described
from glassloop.plan.support import check_fields, fields_of, unsupported
from glassloop.predict.shapes import shapes_of
from glassloop.predict.tiers import Tiers

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton, which has no build for this system",
)


def test_every_family_has_a_model_here():
    assert {kind for kind, _ in MODELS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_every_gradient_are_transformers(model_of, name):
    reference, adapters = model_of(name)
    engine = fused_of(reference)
    wanted, slope = gradient(reference, adapters, passes(packed=False))
    layers = len(engine.layers)
    for packed, tiers in (
        (True, Tiers(layers)),
        (True, Tiers(0)),
        (True, Tiers(1, "inputs")),
        (True, Tiers(0, "attention")),
        (True, Tiers(1, "all")),
        (False, Tiers(1, held=1)),
        (True, Tiers(0, chunk=7)),
        (True, Tiers(0, "all", chunk=10)),
        (False, Tiers(0, "inputs", chunk=16)),
    ):
        engine.use_tiers(tiers)
        found, ours = gradient(engine, adapters, passes(packed=packed))
        assert found == pytest.approx(wanted, rel=1e-5)
        for matrix, place in adapters.slices.items():
            far = float((place.of(ours) - place.of(slope)).norm())
            assert far <= 1e-5 * float(place.of(slope).norm()), f"{matrix}: off by {far:g}"


@pytest.mark.parametrize("name", ["gemma2", "phi3", "olmo2", "glm4"])
def test_a_base_over_a_file_of_layers_gives_the_same(model_of, tmp_path, tiny_tokenizer, name):
    folder, lora = saved_model(name, tmp_path / "model", tiny_tokenizer)
    engine: Any = build_engine(
        ModelConfig(id=str(folder), quantization="nf4", cache_dir=str(tmp_path / "cache")),
        lora,
        precision="fp32",
        checkpointing=False,
        seed=0,
        device=torch.device("cpu"),
        first=contextlib.nullcontext,
        engine="fused",
    )
    assert engine.pages is not None
    reference, adapters = model_of(name)
    wanted, slope = gradient(reference, adapters, passes(packed=False))
    own = adapters_of(engine)
    for streamed in (0, len(engine.layers)):
        engine.use_tiers(Tiers(1, host="all", streamed=streamed))
        found, ours = gradient(engine, own, passes(packed=True))
        assert found == pytest.approx(wanted, rel=1e-5)
        assert float((ours - slope).norm() / slope.norm()) < 1e-5


# model of MODELS -> a field of its description, what it is changed to, as a function
FAULTS: list[tuple[str, str, Any]] = [
    ("llama", "eps", lambda of: 0.1),
    ("llama", "score_scale", lambda of: of.score_scale * 1.1),
    ("llama", "gate", lambda of: "gelu_tanh"),
    ("llama", "added_one", lambda of: True),
    ("llama", "interleaved", lambda of: True),
    ("qwen2, windows", "kinds", lambda of: (Kind(),) * 3),
    ("qwen3", "head_norms", lambda of: ""),
    ("mistral, windows", "kinds", lambda of: (Kind(5),) * 2),
    ("ministral", "kinds", lambda of: tuple(reversed(of.kinds[:2])) + of.kinds[2:]),
    ("gemma2", "score_cap", lambda of: None),
    ("gemma2", "logit_cap", lambda of: None),
    ("gemma2", "logit_cap", lambda of: 3.1),
    ("gemma2", "embedding_scale", lambda of: 1.0),
    ("gemma3", "gate", lambda of: "silu"),
    ("gemma3", "added_one", lambda of: False),
    ("gemma3", "norms", lambda of: Norms()),
    ("gemma3", "kinds", lambda of: tuple(replace(k, rotary="full_attention") for k in of.kinds)),
    ("granite", "residual_scale", lambda of: 1.0),
    ("granite", "embedding_scale", lambda of: 1.0),
    ("granite", "logit_scale", lambda of: 1.0),
    ("olmo2", "head_norms", lambda of: ""),
    ("olmo2", "norms", lambda of: Norms(None, None, "post_attention_layernorm", None)),
    ("smollm3", "kinds", lambda of: (Kind(),) * 2),
    ("glm4", "interleaved", lambda of: False),
    ("glm", "interleaved", lambda of: False),
    ("ernie4_5", "interleaved", lambda of: False),
    ("helium", "interleaved", lambda of: False),
    ("ministral3", "score_scale", lambda of: of.score_scale * 1.1),
    ("exaone4", "kinds", lambda of: tuple(replace(k, rotary="") for k in of.kinds)),
]


@pytest.mark.parametrize(
    ("name", "field", "wrong"), FAULTS, ids=[f"{one[0]}: {one[1]}" for one in FAULTS]
)
def test_a_description_that_is_wrong_in_one_field_is_seen(
    model_of, monkeypatch, name, field, wrong
):
    from glassloop.engines.fused import engine as whole

    reference, adapters = model_of(name)
    wanted, slope = gradient(reference, adapters, passes(packed=False))
    right = whole.describe_supported

    def spoiled(*given: Any) -> Described:
        of = right(*given)
        changed = replace(of, **{field: wrong(of)})
        assert changed != of
        return changed

    monkeypatch.setattr(whole, "describe_supported", spoiled)
    found, ours = gradient(fused_of(reference), adapters, passes(packed=True))
    assert found != pytest.approx(wanted, rel=1e-4)
    assert float((ours - slope).norm() / slope.norm()) > 1e-3


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "phi3", "olmo3", "glm4", "granite"])
def test_the_check_of_a_run_passes_and_sees_a_fault(model_of, monkeypatch, name):
    from glassloop.engines.fused import proof

    reference, adapters = model_of(name)
    engine, rows = fused_of(reference), rows_of((13, 4, 21, 1))
    judge = lambda: proof.disagreement(engine, adapters, rows, packed=True, pad_id=0)  # noqa: E731
    assert judge() == ""
    engine.of = replace(engine.of, embedding_scale=engine.of.embedding_scale * 1.5)
    assert "fused does not compute what peft computes" in judge()


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_field_of_a_family_s_config_is_read_or_known_to_be_without_effect(kind):
    """A field that a newer transformers adds is refused until it is looked at."""
    from glassloop.engines.fused import supported

    config = AutoConfig.for_model(kind, **SIZES)
    names, values = supported.declared(config), fields_of(config)
    check_fields(values, names)
    assert not {name for name in names if name[0] != "_"} - (described(values)[1] | FREE)
    with pytest.raises(Unsupported, match=r"router_noise = 0\.5, which fused does not know"):
        check_fields(values | {"router_noise": 0.5}, names | {"router_noise"})


REFUSED = [
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    ("qwen3", {"layer_types": ["chunked_attention"]}, "layer_types = 'chunked_attention'"),
    ("olmo2", {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
    ("phi3", {"rope_scaling": {"type": "longrope"}}, "longrope without its original length"),
    ("phi3", {"rope_scaling": {"type": "su"}}, "rope_type = 'su'"),
    ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}, "dynamic"),
    ("mistral", {"rope_parameters": {"llama_4_scaling_beta": 0.1}}, "llama_4_scaling_beta"),
    ("ministral3", {"rope_parameters": {"llama_4_scaling_beta": 0.1}}, "without its length"),
    ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ("phi3", {"hidden_act": "gelu"}, "hidden_act = 'gelu', fused knows 'silu'"),
    ("gemma2", {"hidden_activation": "gelu"}, "fused knows 'gelu_pytorch_tanh'"),
]


@pytest.mark.parametrize(("kind", "fields", "said"), REFUSED)
def test_what_a_description_has_no_word_for_is_refused_by_name(kind, fields, said):
    assert unsupported({"model_type": kind}) is None
    assert said in (unsupported({"model_type": kind, **fields}) or "")


def test_a_row_beyond_longrope_s_length_is_refused_and_no_longer_one_changes_it(model_of):
    """transformers exchanges the frequencies in place once it has seen such a row."""
    reference, adapters = model_of("phi3, longrope")
    engine = fused_of(reference)
    wanted, slope = gradient(reference, adapters, passes(packed=False))
    with torch.no_grad():
        reference.hf(input_ids=torch.full((1, 60), 7))
        assert not torch.equal(engine.rotary.inv_freq, engine.rotary.original_inv_freq)
    found, ours = gradient(engine, adapters, passes(packed=True))
    assert found == pytest.approx(wanted, rel=1e-5)
    assert float((ours - slope).norm() / slope.norm()) < 1e-5
    long = build_pass(rows_of((41, 3)), packed=True, pad_id=0, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"a row has 41 tokens.*data\.max_tokens=40"):
        engine(long)


def images_model(folder: Path, tokenizer: Any) -> Path:
    """A small Gemma 3 with a vision tower, saved."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config=SIZES | MIXED | BOTH | {"model_type": "gemma3_text"},
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=122,
    )
    torch.manual_seed(0)
    model = drawn(AutoModelForCausalLM.from_config(config)).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("memory_base", ["auto", "host"])
def test_a_model_for_images_does_not_stream_and_says_so(tmp_path, tiny_tokenizer, memory_base):
    folder, cpu = images_model(tmp_path / "model", tiny_tokenizer), torch.device("cpu")
    built = functools.partial(
        build_engine,
        ModelConfig(id=str(folder), cache_dir=str(tmp_path / "cache")),
        LoraConfig(r=3, alpha=6),
        precision="fp32",
        checkpointing=False,
        seed=0,
        device=cpu,
        first=contextlib.nullcontext,
        engine="fused",
        memory_base=memory_base,
    )
    if memory_base == "host":
        with pytest.raises(ValueError, match=r"memory\.base = host: .*beside its decoder"):
            built()
    else:
        assert built().pages is None


def test_scores_that_grow_with_the_place_are_refused_where_they_begin_to_grow(model_of):
    """Ministral 3: below its original length the factor is 1, at it the factor is no more."""
    reference, adapters = model_of("ministral3")
    engine, cpu = fused_of(reference), torch.device("cpu")
    for packed in (True, False):
        p = build_pass(rows_of((40, 3)), packed=packed, pad_id=0, device=cpu)
        wanted, slope = gradient(reference, adapters, p)
        found, ours = gradient(engine, adapters, p)
        assert found == pytest.approx(wanted, rel=1e-5)
        assert float((ours - slope).norm() / slope.norm()) < 1e-5
    long = build_pass(rows_of((41, 3)), packed=True, pad_id=0, device=cpu)
    with pytest.raises(ValueError, match=r"a row has 41 tokens.*data\.max_tokens=40"):
        engine(long)


def test_the_decoder_of_a_model_for_images_trains_alone(engine_of, tmp_path, tiny_tokenizer):
    """Its vision tower has projections of the same names: no row of text reaches them."""
    model = AutoModelForCausalLM.from_pretrained(images_model(tmp_path, tiny_tokenizer))
    lora = LoraConfig(r=3, alpha=6, targets=linear_names(model))
    assert set(lora.targets) == set(PROJECTIONS)
    reference = engine_of(tmp_path, quantization="nf4", lora=lora)
    adapters = adapters_of(reference)
    assert not any("vision" in name for name in adapters.slices)
    wanted, slope = gradient(reference, adapters, passes(packed=False))
    found, ours = gradient(fused_of(reference), adapters, passes(packed=True))
    assert found == pytest.approx(wanted, rel=1e-5)
    assert float((ours - slope).norm() / slope.norm()) < 1e-5
    assert unsupported(json.loads((tmp_path / "config.json").read_text())) is None
    shapes, _ = shapes_of(str(tmp_path))
    assert shapes is not None and shapes.family == "gemma3_text" and shapes.layers == 3
