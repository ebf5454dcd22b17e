"""A run and a plan keep, show and resume the engine that was chosen."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from model_configs import LLAMA

from glassloop.cli.plan import main as plan
from glassloop.config.arguments import from_values, parse
from glassloop.loop import engine_here
from glassloop.plan.engine import Choice
from glassloop.record.reading import with_overrides

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="the fused engine needs triton"
)


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
