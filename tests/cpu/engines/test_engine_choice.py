"""`execution.engine=auto`: its choice, the run's folder, resuming."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from model_configs import LLAMA

from glassloop.base.source import locate_base
from glassloop.config.arguments import ConfigError, from_values
from glassloop.engines.fused import supported
from glassloop.plan.engine import Choice, choose_engine, in_words, with_engine
from glassloop.plan.support import fields_of

# Asked of the run, of its model, lacking on the machine -> why it is the reference engine.
REASONS = {
    "quantization": (
        {"model": {"quantization": "none"}},
        {},
        "",
        "model.quantization = none, fused has its weights in NF4",
    ),
    "attention": (
        {"model": {"attention": "eager"}},
        {},
        "",
        "model.attention = eager, fused chooses attention itself",
    ),
    "dropout": ({"lora": {"dropout": 0.1}}, {}, "", "lora.dropout = 0.1, fused has none"),
    "fp16": (
        {"execution": {"precision": "fp16"}},
        {},
        "",
        "execution.precision = fp16, fused computes in bf16 or fp32",
    ),
    "ddp": (
        {"execution": {"reduction": "ddp"}},
        {},
        "",
        "execution.reduction = ddp, fused writes gradients in place",
    ),
    "family": (
        {},
        {"model_type": "mixtral"},
        "",
        "model_type = 'mixtral', fused knows 'llama', 'qwen2'",
    ),
    "activation": ({}, {"hidden_act": "gelu"}, "", "hidden_act = 'gelu', fused knows 'silu'"),
    "tensor parallel": ({}, {"pretraining_tp": 2}, "", "pretraining_tp = 2"),
    "window": ({}, {"sliding_window": 4096}, "", "sliding_window = 4096"),
    "half of a head turned": (
        {},
        {"partial_rotary_factor": 0.5},
        "",
        "partial_rotary_factor = 0.5",
    ),
    "the same, newer": (
        {},
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "",
        "partial_rotary_factor = 0.5",
    ),
    "rope": (
        {},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "",
        "rope_type = 'dynamic', fused knows 'default', 'linear'",
    ),
    "rows beyond its frequencies": (
        {"data": {"max_tokens": 5000}},
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "original_max_position_embeddings": 4096,
            }
        },
        "",
        "data.max_tokens = 5000, fused knows this model to 4096",
    ),
    "rope, newer": (
        {},
        {"rope_parameters": {"rope_type": "own"}},
        "",
        "rope_type = 'own'",
    ),
    "layers left out of NF4": (
        {},
        {"quantization_config": {"llm_int8_skip_modules": ["lm_head", "model.layers.1.mlp"]}},
        "",
        "own quantisation leaves out model.layers.1.mlp",
    ),
    "width": ({}, {"hidden_size": 100}, "", "hidden_size = 100, fused needs a multiple of 64"),
    "width of the mlp": ({}, {"intermediate_size": 100}, "", "intermediate_size = 100"),
    "width of the heads": ({}, {"head_dim": 20}, "", "num_attention_heads x head_dim = 80"),
    "own code": (
        {"model": {"trust_remote_code": True}},
        {"auto_map": {"AutoModelForCausalLM": "own.Own"}},
        "",
        "the model brings Python code of its own",
    ),
    "machine": ({}, {}, "fused needs triton, which is not installed", "fused needs triton"),
}


@pytest.mark.parametrize(("sections", "fields", "lacking", "why"), REASONS.values(), ids=REASONS)
def test_on_cuda_the_reference_engine_is_taken_for_a_reason_that_is_named(
    sections, fields, lacking, why
):
    config = from_values(sections)
    assert choose_engine(config, LLAMA, on_cuda=True) == Choice("fused") or not fields, (
        "the model's field decides"
    )
    choice = choose_engine(config, LLAMA | fields, on_cuda=True, lacking=lacking)
    assert choice.engine == "peft" and why in choice.why
    assert in_words(config, choice) == f"peft (auto: {choice.why})"
    assert with_engine(config, choice).execution.engine == "peft"


def test_every_refusal_of_the_fused_engine_names_the_reference_engine_as_cure():
    seen = 0
    for file in sorted(Path(supported.__file__).parent.glob("*.py")):
        source = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Raise) and "ValueError" in (
                text := ast.get_source_segment(source, node) or ""
            ):
                seen += 1
                if file.name == "pinned.py":  # a lack of memory, which every engine may have
                    assert "cure" in text
                    continue
                assert "CURE" in text or "execution.engine=peft" in text, f"{file.name}: {text}"
    assert seen >= 10 and supported.CURE == "set execution.engine=peft"


@pytest.mark.parametrize("name", ["quantization", "attention", "dropout", "fp16", "ddp"])
def test_what_keeps_auto_from_fused_is_refused_where_fused_is_named(name):
    sections = REASONS[name][0]
    execution = {"engine": "fused", **sections.get("execution", {})}
    with pytest.raises(
        ConfigError, match=r"execution.engine = fused and .*execution\.engine=peft"
    ) as refused:
        from_values(sections | {"execution": execution})
    what, _, why = REASONS[name][3].partition(", ")
    assert what in str(refused.value) and why in str(refused.value)


LIKED = {
    "a plain Llama": LLAMA,
    "biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "a Qwen2 and its unused window": LLAMA
    | {"model_type": "qwen2", "sliding_window": 131072, "use_sliding_window": False},
    "the same, without saying so": LLAMA | {"model_type": "qwen2", "sliding_window": 131072},
    "llama3's frequencies": LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    "a head that is not in NF4": LLAMA
    | {"quantization_config": {"llm_int8_skip_modules": ["lm_head"]}},
    "code that is not run": LLAMA | {"auto_map": {"AutoModelForCausalLM": "own.Own"}},
    "nothing known": None,
}


@pytest.mark.parametrize("model", LIKED.values(), ids=LIKED)
def test_fused_is_taken_on_cuda_and_never_on_a_cpu(model):
    for precision in ("bf16", "fp32"):
        config = from_values({"execution": {"precision": precision}, "memory": {"profile": "fill"}})
        assert config.execution.engine == "auto"  # the default
        choice = choose_engine(config, model, on_cuda=True)
        assert choice == Choice("fused") and in_words(config, choice) == "fused (auto)"
        assert choose_engine(config, model, on_cuda=False) == Choice("peft", "no CUDA GPU")


@pytest.mark.parametrize("engine", ["peft", "fused", "unsloth"])
def test_a_named_engine_is_taken_as_it_is(engine):
    config = from_values({"execution": {"engine": engine}})
    for on_cuda in (True, False):
        assert choose_engine(config, LLAMA | {"model_type": "gpt2"}, on_cuda=on_cuda) == Choice(
            engine
        )
    assert in_words(config, Choice(engine)) == ""


def test_memory_that_only_fused_heeds_is_refused_where_auto_takes_another():
    config = from_values({"memory": {"profile": "min"}})
    assert with_engine(config, Choice("fused")).memory.profile == "min"
    with pytest.raises(ValueError, match=r"auto chose peft \(no CUDA GPU\). Remove memory"):
        with_engine(config, choose_engine(config, LLAMA, on_cuda=False))


def test_the_loaded_config_and_config_json_are_judged_alike(tiny_llama, tiny_qwen2, changed):
    from transformers import AutoConfig

    for folder, engine in (
        (tiny_llama, "fused"),
        (tiny_qwen2, "fused"),
        (changed("qwen2", sliding_window=64), "fused"),
        (changed("qwen2", sliding_window=64, use_sliding_window=True), "fused"),
        (changed("llama", hidden_act="gelu"), "peft"),
    ):
        loaded = AutoConfig.from_pretrained(folder)
        on_disk = json.loads((folder / "config.json").read_text())
        config = from_values({"model": {"id": str(folder)}})
        choices = [
            choose_engine(config, values, on_cuda=True)
            for values in (fields_of(loaded), on_disk, locate_base(config.model)[1])
        ]
        assert [choice.engine for choice in choices] == [engine] * 3 and len(set(choices)) == 1
