"""`execution.engine=auto`: its choice, the run's folder, resuming."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from glassloop.base.source import locate_base
from glassloop.cli.plan import main as plan
from glassloop.config.arguments import ConfigError, from_values, parse
from glassloop.engines.fused import supported
from glassloop.loop import engine_here
from glassloop.plan.engine import Choice, choose_engine, in_words, with_engine
from glassloop.plan.support import FIELDS, SUPPORTED, fields_of
from glassloop.record.reading import with_overrides

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "head_dim": 16,
}
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="the fused engine needs triton"
)


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
        {"model_type": "mistral"},
        "",
        "model_type = 'mistral', fused knows 'llama', 'qwen2'",
    ),
    "activation": ({}, {"hidden_act": "gelu"}, "", "hidden_act = 'gelu', fused knows 'silu'"),
    "tensor parallel": ({}, {"pretraining_tp": 2}, "", "pretraining_tp = 2"),
    "window of a Qwen2": (
        {},
        {"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": True},
        "",
        "sliding_window = 4096",
    ),
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
    "rope, newer": ({}, {"rope_parameters": {"rope_type": "yarn"}}, "", "rope_type = 'yarn'"),
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


def test_every_field_that_the_engine_looks_at_has_a_row():
    rows = {name for _, fields, _, _ in REASONS.values() for name in fields}
    assert set(SUPPORTED) <= rows


def test_every_refusal_of_the_fused_engine_names_the_reference_engine_as_cure():
    seen = 0
    for file in sorted(Path(supported.__file__).parent.glob("*.py")):
        source = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Raise) and "ValueError" in (
                text := ast.get_source_segment(source, node) or ""
            ):
                seen += 1
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


@pytest.fixture
def changed(tiny_llama, tiny_qwen2, tmp_path: Path) -> Callable[..., Path]:
    """A tiny model's folder with other fields in config.json."""

    def make(family: str, **fields: object) -> Path:
        folder = shutil.copytree(
            {"llama": tiny_llama, "qwen2": tiny_qwen2}[family],
            tmp_path / f"{family}-{'-'.join(fields)}",
        )
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | fields))
        return folder

    return make


def test_the_loaded_config_and_config_json_are_judged_alike(tiny_llama, tiny_qwen2, changed):
    from transformers import AutoConfig

    for folder, engine in (
        (tiny_llama, "fused"),
        (tiny_qwen2, "fused"),
        (changed("qwen2", sliding_window=64), "fused"),
        (changed("qwen2", sliding_window=64, use_sliding_window=True), "peft"),
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
        assert set(fields_of(loaded)) <= set(FIELDS)


# --- the run


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose as on a GPU.

    The run itself stays on the CPU, where fused runs its reference kernels.
    """
    monkeypatch.setattr(engine_here, "on_cuda", lambda: True)
    monkeypatch.setattr(engine_here, "lacking_here", lambda: "")


AUTO = {"engine": "auto", "precision": "fp32", "checkpointing": False, "preflight": False}


def line(run) -> str:
    return next((one for one in run.header if one.startswith("engine ")), "")


def engines_on_disk(folder: Path) -> set[str]:
    """Engines that the run's folder names, wherever it does."""
    found = {yaml.safe_load((folder / "config.yaml").read_text())["execution"]["engine"]}
    found.add(json.loads((folder / "plan.json").read_text())["contract"]["engine"])
    found |= {
        json.loads(path.read_text())["config"]["execution"]["engine"]
        for path in folder.glob("checkpoints/*/state.json")
    }
    found |= {
        json.loads(path.read_text())["config"]["execution"]["engine"]
        for path in folder.glob("capsules/*/capsule.json")
    }
    return found


def carry_out(run, update: int):
    from train_loop import update_once

    outcome = update_once(run, update)
    assert outcome is not None and outcome.record.action == "applied"
    run.tell(outcome)
    run.save(update)
    run.close_observers()


def resumed(folder: Path, *words: str):
    from accelerate.state import AcceleratorState

    from glassloop.loop.build import build_run

    AcceleratorState._reset_state(True)
    return build_run(parse(["--resume", str(folder), *words]))


@needs_triton
def test_a_run_on_a_gpu_says_fused_keeps_it_in_its_folder_and_goes_on_with_it_without_a_gpu(
    run_of, monkeypatch, as_on_cuda
):
    run = run_of(execution=AUTO, record={"capture_updates": [1]})
    assert (
        run.replica.plain_engine.name == run.config.execution.engine == "fused"
        and line(run) == "engine    fused (auto)"
    )
    carry_out(run, 1)
    assert list(run.folder.glob("capsules/*/capsule.json"))
    assert engines_on_disk(run.folder) == {"fused"}
    monkeypatch.undo()  # a machine without a GPU
    for update, words in ((2, ()), (3, ("execution.engine=auto",))):
        run = resumed(run.folder, *words)
        assert (run.replica.plain_engine.name, run.first_update) == ("fused", update)
        assert line(run) == ("engine    fused (auto: as the run began)" if words else "")
        carry_out(run, update)
    run = resumed(run.folder, "execution.engine=peft")
    assert run.replica.plain_engine.name == "peft"
    carry_out(run, 4)
    run = resumed(run.folder, "execution.engine=auto")
    assert run.replica.plain_engine.name == "peft"  # that of the checkpoint
    run.close_observers()
    run = resumed(run.folder, "execution.engine=auto", "--at", "0")
    assert run.replica.plain_engine.name == "peft"  # that plan.json has since the last resume
    run.close_observers()


def test_a_run_on_a_gpu_says_why_it_is_not_fused(run_of, changed, as_on_cuda):
    run = run_of(execution=AUTO, model={"id": str(changed("llama", hidden_act="gelu"))})
    assert run.replica.plain_engine.name == "peft"
    assert (
        line(run)
        == "engine    peft (auto: the model's config has hidden_act = 'gelu', fused knows 'silu')"
    )
    run.close_observers()
    assert engines_on_disk(run.folder) == {"peft"}


def test_a_run_on_a_cpu_is_the_reference_engines_and_does_not_become_another_on_a_gpu(
    run_of, monkeypatch
):
    run = run_of(execution=AUTO)
    assert (
        run.replica.plain_engine.name == "peft"
        and line(run) == "engine    peft (auto: no CUDA GPU)"
    )
    carry_out(run, 1)
    assert engines_on_disk(run.folder) == {"peft"}
    monkeypatch.setattr(engine_here, "on_cuda", lambda: True)
    run = resumed(run.folder)
    assert run.replica.plain_engine.name == "peft"
    run.close_observers()


def test_what_one_rank_lacks_all_ranks_do_without(tiny_llama, monkeypatch, as_on_cuda):
    monkeypatch.setattr(
        engine_here,
        "gather_objects",
        lambda mine: [mine, "fused needs triton, which is not installed"],
    )
    config = from_values({"model": {"id": str(tiny_llama)}})
    found = engine_here.engine_here(config, None, {}, LLAMA)
    assert found == Choice("peft", "fused needs triton, which is not installed")


@pytest.mark.parametrize(
    ("capability", "said"),
    [((7, 5), "A card has compute capability 7.5, fused needs 8.0"), ((8, 0), ""), ((12, 0), "")],
)
def test_an_old_card_lacks_something(monkeypatch, capability, said):
    monkeypatch.setattr(engine_here.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(engine_here.torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(engine_here.torch.cuda, "get_device_name", lambda: "A card")
    assert engine_here.lacking_here() == said
    monkeypatch.setattr(engine_here.importlib.util, "find_spec", lambda name: None)
    assert engine_here.lacking_here() == "fused needs triton, which is not installed"


def test_a_recorded_config_without_an_engine_is_from_before_there_was_a_choice(tmp_path):
    values = {"preset": "", "execution": {"precision": "fp32"}}
    assert with_overrides(values, {}).execution.engine == "peft"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert parse(["--resume", str(tmp_path)]).execution.engine == "peft"
    assert parse(["--resume", str(tmp_path), "execution.engine=fused"]).execution.engine == "fused"


def test_a_cell_that_asks_for_auto_knows_its_run_again(tmp_path, run_of):
    from glassloop.study.cell_state import state_of
    from glassloop.study.spec import Cell

    run = run_of(execution=AUTO, run={"dir": str(tmp_path / "cells"), "name": "one"})
    carry_out(run, 1)
    asked = run.config.model_copy(
        update={"execution": run.config.execution.model_copy(update={"engine": "auto"})}
    )
    cell = Cell("one", "one", {}, 1, asked)
    assert state_of(cell, tmp_path).kind == "partial"
    named = asked.execution.model_copy(update={"engine": "fused"})
    other = state_of(replace(cell, config=asked.model_copy(update={"execution": named})), tmp_path)
    assert other.kind == "other" and "execution.engine = peft, and fused is asked now" in other.why


# --- the plan


@pytest.mark.parametrize(
    ("words", "engine", "said"),
    [
        ((), "fused", "auto: fused on CUDA, peft on a CPU"),
        (
            ("lora.dropout=0.1",),
            "peft",
            "auto: peft on CUDA too (lora.dropout = 0.1, fused has none)",
        ),
        (
            ("model.id=nowhere/at-all",),
            "fused",
            "auto: fused on CUDA, if fused supports the model",
        ),
        (("execution.engine=peft",), "peft", "peft"),
        (("execution.engine=fused",), "fused", "fused"),
    ],
)
def test_a_plan_is_made_for_the_engine_of_a_gpu_and_says_so(
    capsys, monkeypatch, words, engine, said
):
    monkeypatch.setattr("glassloop.predict.hardware.gpus_present", lambda: ())
    assert plan(["r1_8b_scam", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["engine"] == engine and found["engine_in_words"].startswith(said)
    if "model.id" not in str(words):
        assert all((card["kept"] is not None) == (engine == "fused") for card in found["cards"])
        assert found["memory_of"] == (["all kept", "min"] if engine == "fused" else ["NF4", "bf16"])
    assert plan(["r1_8b_scam", *words]) == 0
    assert f"engine    {said}" in capsys.readouterr().out


def test_a_plan_looks_at_a_local_models_config(capsys, monkeypatch, tiny_llama, changed):
    monkeypatch.setattr("glassloop.predict.hardware.gpus_present", lambda: ())
    for folder, engine in ((tiny_llama, "fused"), (changed("llama", hidden_act="gelu"), "peft")):
        assert plan(["r1_8b_scam", f"model.id={folder}", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["engine"] == engine


@pytest.mark.parametrize(
    ("engine", "precision", "said"),
    [("peft", "bf16", True), ("peft", "fp32", False), ("fused", "bf16", False)],
)
def test_the_header_says_what_peft_loses_in_bf16(run_of, engine, precision, said):
    if engine == "fused":
        pytest.importorskip("triton")
    header = run_of(execution={"engine": engine, "precision": precision}).header
    assert any("part of it is lost" in line for line in header) is said
