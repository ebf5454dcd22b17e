"""The engine `unsloth` without a GPU and without Unsloth.

Refusals with their reasons, and all that is ours around it, on a stand-in.
"""

from __future__ import annotations

import contextlib
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
from accelerate.state import AcceleratorState
from pydantic import ValidationError
from stand_in import write_stand_in

from glassloop.base.quantised import find_base, load_base
from glassloop.config import LoraConfig, ModelConfig
from glassloop.config.arguments import from_values
from glassloop.data.batches import build_pass
from glassloop.data.rows import Row
from glassloop.engines import unsloth as unsloth_engine
from glassloop.engines import unsloth_checks as checks
from glassloop.engines.build import build_engine
from glassloop.engines.peft import PeftEngine
from glassloop.formula.optim import FlatAdapters
from glassloop.plan.outlook import look_ahead, plan_of
from glassloop.plan.render import render

CPU = torch.device("cpu")
ROWS = [
    Row(str(i), tuple(range(6 + i, 30 + 5 * i)), (False,) * 10 + (True,) * (14 + 4 * i))
    for i in range(3)
]


# --- refused before anything is imported

TRUE_LIMITS = {
    "unsloth": (
        'trl==0.1; extra == "colab"',
        "torch<2.15.0,>=2.4.0",
        "datasets!=4.0.*,!=4.1.0,<5.0.0,>=3.4.1",
        "transformers!=4.53.0,!=5.0.0,<=5.17.0,>=4.52.4",
        "trl!=0.19.0,<=1.15.0,>=0.18.2",
        "typer>=0.19.0",
        "unsloth_zoo>=2026.10.9",
        'triton>=3.0.0; "linux" in sys_platform',
    ),
    "unsloth-zoo": ("peft!=0.11.0,>=0.18.0",),
}
SOUND = {
    "unsloth": "2026.10.9",
    "unsloth-zoo": "2026.10.9",
    "torch": "2.11.0+cu130",
    "datasets": "4.7.0",
    "transformers": "5.17.0",
    "trl": "1.15.0",
    "triton": "3.6.0",
    "peft": "0.21.2",
}


def problems(*, on_cuda: bool = True, **versions: str | None) -> str:
    there = SOUND | {name.replace("_", "-"): version for name, version in versions.items()}
    return "\n".join(
        checks.problems(
            on_cuda=on_cuda,
            installed=there.get,
            requirements=lambda name: TRUE_LIMITS.get(name, ()),
        )
    )


def test_nothing_stands_in_the_way_on_a_sound_machine() -> None:
    assert problems() == ""
    assert problems(typer=None, sentencepiece=None) == ""  # what training does without


@pytest.mark.parametrize(
    ("versions", "told"),
    [
        (
            dict(transformers="5.23.0"),
            (
                "transformers 5.23.0 is here",
                "admits transformers<=5.17.0",
                "pip install 'transformers<=5.17.0,>=4.52.4'",
            ),
        ),
        (dict(transformers="5.0.0"), ("transformers 5.0.0 is here", "admits transformers!=5.0.0")),
        (dict(trl="1.16.0"), ("trl 1.16.0 is here", "admits trl<=1.15.0")),
        (dict(torch="2.15.0"), ("torch 2.15.0 is here", "admits torch<2.15.0")),
        (dict(datasets="4.0.2"), ("datasets 4.0.2 is here", "!=4.0.*")),
        (dict(datasets="5.2.0", trl="1.16.0"), ("datasets 5.2.0", "trl 1.16.0")),
        (dict(triton=None), ("triton is not installed", "pip install 'triton>=3.0.0'")),
        (dict(unsloth_zoo=None), ("unsloth-zoo is not installed",)),
        (dict(peft="0.17"), ("peft 0.17 is here, unsloth-zoo 2026.10.9 admits peft>=0.18.0",)),
    ],
)  # fmt: skip
def test_each_conflict_is_named_with_its_cure(
    versions: dict[str, str | None], told: tuple[str, ...]
) -> None:
    said = problems(**versions)
    for part in told:
        assert part in said
    assert "environment of its own" in said


def test_a_missing_unsloth_and_a_missing_gpu_are_said() -> None:
    assert "not installed" in problems(unsloth=None) and "transformers<=5.17.0" in problems(
        unsloth=None
    )
    assert "sees no CUDA device" in problems(on_cuda=False)
    with pytest.raises(
        ValueError,
        match=r"execution.engine = unsloth cannot run here:\n  it is not installed"
        r"(?s:.)*execution.engine=peft",
    ):
        checks.check_unsloth(on_cuda=True)


def test_a_run_is_refused_before_its_model_is_looked_for(run_of, capsys) -> None:
    with pytest.raises(ValueError, match=r"execution.engine = unsloth cannot run here"):
        run_of(execution={"engine": "unsloth"}, model={"id": "/nowhere"})
    assert "unsloth" not in sys.modules


def test_doctor_and_plan_know_the_engine() -> None:
    from glassloop.doctor.checks import check_engine

    config = from_values({"execution": {"engine": "unsloth"}})
    here = SOUND | {"transformers": "5.23.0"}

    def found(**more: Any) -> list[str]:
        return checks.problems(
            installed=here.get, requirements=lambda name: TRUE_LIMITS.get(name, ()), **more
        )

    (one,) = check_engine(config, on_cuda=True, problems=found)
    assert (
        one.level == "problem"
        and "transformers 5.23.0 is here" in one.text
        and "environment of its own" in one.cure
    )
    assert [one.level for one in check_engine(config, on_cuda=True, problems=lambda **_: [])] == [
        "ok"
    ]
    assert (
        check_engine(from_values({"execution": {"engine": "peft"}}), on_cuda=True, problems=found)
        == []
    )
    plan = plan_of(config, 64, 1)
    outlook = look_ahead(config, plan, rows_from="given")
    assert outlook.ledger is None and outlook.verdicts == () and outlook.times == ()
    assert any("memory and time of execution.engine=unsloth" in line for line in render(outlook))


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("model", "quantization", "none"),
        ("model", "attention", "eager"),
        ("lora", "dropout", 0.1),
        ("execution", "precision", "fp32"),
        ("execution", "reduction", "ddp"),
    ],
)
def test_what_it_would_do_otherwise_than_asked_is_refused(
    section: str, field: str, value: Any
) -> None:
    values = {"execution": {"engine": "unsloth"}}
    from_values(values)
    values[section] = {**values.get(section, {}), field: value}
    with pytest.raises(
        (ValueError, ValidationError),
        match=rf"execution.engine = unsloth and {section}\.{field} = (?s:.)*engine=peft",
    ):
        from_values(values)


# --- on the stand-in


@pytest.fixture
def unsloth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(write_stand_in(tmp_path / "site")))
    monkeypatch.setattr(checks, "problems", lambda **_: [])
    for name in ("UNSLOTH_DISABLE_STATISTICS", "UNSLOTH_COMPILE_LOCATION"):
        monkeypatch.setenv(name, "kept")
    for name in [
        name for name in sys.modules if name.partition(".")[0] in ("unsloth", "unsloth_zoo")
    ]:
        monkeypatch.delitem(sys.modules, name)
    import unsloth

    yield unsloth  # type: ignore[misc]
    sys.modules.pop("unsloth", None)
    AcceleratorState._reset_state(True)


def engine(
    folder: Path, name: str, *, longest_row: int = 96, checkpointing: bool = False, **model: Any
) -> PeftEngine:
    return build_engine(
        ModelConfig(id=str(folder), **model),
        LoraConfig(r=4, alpha=8),
        precision="bf16",
        checkpointing=checkpointing,
        seed=7,
        device=CPU,
        first=contextlib.nullcontext,
        engine=name,
        longest_row=longest_row,
    )


def sums(one: PeftEngine, *, packed: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    adapters = FlatAdapters(one.hf.named_parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, by_row = one(build_pass(ROWS, packed=packed, pad_id=0, device=CPU))
    total.backward()
    adapters.check_views()
    return total, by_row, adapters.grad


@pytest.mark.usefixtures("unsloth")
@pytest.mark.parametrize("packed", [False, True])
def test_loss_rows_and_gradient_are_the_references(tiny_llama: Path, packed: bool) -> None:
    reference, ours = engine(tiny_llama, "peft"), engine(tiny_llama, "unsloth")
    assert [name for name, p in ours.named_parameters() if p.requires_grad] == [
        name for name, p in reference.named_parameters() if p.requires_grad
    ]
    mine, theirs = (dict(one.hf.named_parameters()) for one in (ours, reference))
    for name, p in mine.items():
        if p.requires_grad:
            assert p.dtype == torch.float32 and torch.equal(p, theirs[name])
        if "lora_B" in name:  # B is 0 at first, and then hides what A does
            with torch.no_grad():
                p.copy_(theirs[name].normal_(std=0.05, generator=torch.Generator().manual_seed(1)))
    for found, expected in zip(
        sums(ours, packed=packed), sums(reference, packed=packed), strict=True
    ):
        assert float((found - expected).norm() / expected.norm()) < 2e-2


def test_it_is_asked_for_the_very_files_and_the_recipes_adapters(
    tiny_llama: Path, unsloth: Any
) -> None:
    one = engine(tiny_llama, "unsloth", checkpointing=True, longest_row=512)
    load, adapters, begun = unsloth.calls
    assert begun == "for_training" and one.hf.get_base_model().is_gradient_checkpointing  # type: ignore[operator]
    assert (
        load["use_exact_model_name"] and load["load_in_4bit"] and load["device_map"] == {"": "cpu"}
    )
    assert (load["max_seq_length"], load["dtype"], load["use_gradient_checkpointing"]) == (
        512,
        torch.bfloat16,
        "unsloth",
    )
    assert (
        not load["offload_embedding"]
        and not load["fix_tokenizer"]
        and not Path(load["model_name"]).exists()
    )
    assert (adapters["r"], adapters["lora_alpha"], adapters["lora_dropout"], adapters["bias"]) == (
        4,
        8,
        0.0,
        "none",
    )
    assert (
        set(adapters["target_modules"]) == set(LoraConfig().targets)
        and adapters["use_gradient_checkpointing"] == "unsloth"
    )
    assert engine(tiny_llama, "unsloth").report.checksum == one.report.checksum
    assert unsloth.calls[4]["use_gradient_checkpointing"] is False
    assert one.hf.peft_config["default"].base_model_name_or_path == str(tiny_llama)  # type: ignore[index, union-attr]
    assert (one.name, one.attention) == ("unsloth", "unsloth")


def test_banner_and_random_numbers_stay_to_itself(
    tiny_llama: Path, unsloth: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    before = (
        random.getstate(),
        numpy.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    )
    engine(tiny_llama, "unsloth")
    assert (
        random.getstate(),
        numpy.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    ) == before
    assert "banner" not in capsys.readouterr().out


def test_another_pad_token_is_put_back_and_said(tiny_llama: Path, unsloth: Any) -> None:
    one = engine(tiny_llama, "unsloth")
    assert one.hf.config.pad_token_id == 0  # type: ignore[union-attr]
    assert any("would pad with id 2; this run pads with 0" in note for note in one.report.notes)


def test_the_pad_tokens_row_stays(tiny_llama: Path, tmp_path: Path, unsloth: Any) -> None:
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    with torch.no_grad():
        hf.get_input_embeddings().weight[0] = (
            1  # a row of pad tokens is made as zeros, and trained models have others
        )
    hf.save_pretrained(tmp_path / "model")
    for file in tiny_llama.glob("*token*"):
        (tmp_path / "model" / file.name).symlink_to(file)
    for file in tiny_llama.glob("*.jinja"):
        (tmp_path / "model" / file.name).symlink_to(file)
    one = engine(tmp_path / "model", "unsloth")
    assert one.hf.get_input_embeddings().weight[0].eq(1).all()  # type: ignore[operator]


SPOILED = {
    "a value": (lambda hf: hf.lm_head.weight.data[3].add_(1), r"lm_head\.weight has other values"),
    "a dtype": (
        lambda hf: hf.model.norm.to(torch.float32),
        r"model\.norm\.weight is torch\.float32 \(64,\), was torch\.bfloat16",
    ),
    "a size": (
        lambda hf: hf.resize_token_embeddings(520),
        r"model\.embed_tokens\.weight is torch\.bfloat16 \(520, 64\), was",
    ),
    "an NF4 scale": (
        lambda hf: hf.model.layers[1].mlp.up_proj.weight.quant_state.absmax.add_(1),
        r"layers\.1\.mlp\.up_proj\.weight\.absmax has other values",
    ),
}


@pytest.mark.parametrize(("spoil", "told"), SPOILED.values(), ids=SPOILED)
def test_another_base_than_pefts_is_refused(
    tiny_llama: Path, unsloth: Any, spoil: Any, told: str
) -> None:
    unsloth.FastLanguageModel.spoil = staticmethod(spoil)
    with pytest.raises(
        ValueError, match=rf"is not the one that execution.engine = peft trains on \((?s:.)*{told}"
    ):
        engine(tiny_llama, "unsloth")


def test_its_own_errors_come_with_a_cure_and_its_output(
    tiny_llama: Path, unsloth: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(hf: Any) -> None:
        raise NotImplementedError("Unsloth: poetry is not\nsupported")

    unsloth.FastLanguageModel.spoil = staticmethod(fail)
    with pytest.raises(
        ValueError,
        match=r"cannot load model.id = .*poetry is not supported\): set execution.engine=peft",
    ):
        engine(tiny_llama, "unsloth")
    assert "banner" in capsys.readouterr().err

    def no_room(hf: Any) -> None:
        raise torch.OutOfMemoryError("of 24 GB")

    unsloth.FastLanguageModel.spoil = staticmethod(no_room)
    with pytest.raises(torch.OutOfMemoryError):
        engine(tiny_llama, "unsloth")


def test_an_import_that_fails_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "unsloth", None)
    with pytest.raises(ValueError, match="its import fails"):
        unsloth_engine.import_unsloth()


def test_rows_beyond_the_models_positions_are_refused() -> None:
    fields = {"max_position_embeddings": 512}
    assert (
        unsloth_engine.rows_allowed(96, fields) == 512
    )  # shorter ones take another way to recompute
    assert unsloth_engine.rows_allowed(None, fields) == 512
    assert unsloth_engine.rows_allowed(4096, {"max_position_embeddings": 131072}) == 4096
    with pytest.raises(
        ValueError,
        match=r"data.max_tokens = 513 is more than the 512 positions.*data.max_tokens=512",
    ):
        unsloth_engine.rows_allowed(513, fields)


def test_a_pass_that_was_cut_is_no_loss(
    tiny_llama: Path, unsloth: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = engine(tiny_llama, "unsloth")
    whole = one.hidden_states
    monkeypatch.setattr(one, "hidden_states", lambda ids: whole(ids[:, :-1]))
    with pytest.raises(AssertionError, match="unsloth cut a pass"):
        one(build_pass(ROWS, packed=False, pad_id=0, device=CPU))


def test_generations_marks_are_gone_before_the_next_update(tiny_llama: Path, unsloth: Any) -> None:
    one = engine(tiny_llama, "unsloth", checkpointing=True)
    base = one.hf.get_base_model()  # type: ignore[operator]
    base._flag_for_generation = True
    for module in base.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    one.eval()
    one(build_pass(ROWS, packed=False, pad_id=0, device=CPU))
    assert unsloth.calls.count("for_training") == 1  # when it was loaded
    one.train()
    for _ in range(2):
        one(build_pass(ROWS, packed=False, pad_id=0, device=CPU))
    assert unsloth.calls.count("for_training") == 2
    assert base.is_gradient_checkpointing


@pytest.mark.parametrize("kind", ["quantised here", "comes quantised"])
def test_the_base_is_found_without_being_kept(tiny_llama: Path, tmp_path: Path, kind: str) -> None:
    how: dict[str, Any] = dict(precision="bf16", device=CPU, first=contextlib.nullcontext)
    model = ModelConfig(id=str(tiny_llama), cache_dir=str(tmp_path / "cache"))
    if kind == "comes quantised":
        _, first = load_base(model, **how)
        model = ModelConfig(id=str(first.folder), cache_dir=str(tmp_path / "other"))
    found = find_base(model, **how)
    _, loaded = load_base(model, **how)
    for field in ("name", "commit", "base_hash", "checksum", "folder"):
        assert getattr(found, field) == getattr(loaded, field), field


def test_a_damaged_copy_is_told_before_unsloth_reads_it(tiny_llama: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = dict(precision="bf16", device=CPU, first=contextlib.nullcontext)
    model = ModelConfig(id=str(tiny_llama), cache_dir=str(tmp_path / "cache"))
    report = find_base(model, **how)
    config = Path(str(report.folder)) / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(ValueError, match=r"quantised copy of .* is damaged \(config.json"):
        find_base(model, **how)


@pytest.mark.usefixtures("unsloth")
def test_a_run_goes_on_in_the_other_engine(
    run_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train_loop import update_once

    ends = []
    for second in ("peft", "unsloth"):
        run = run_of(execution={"engine": "peft"})
        run.begin()
        for u in (1, 2):
            outcome = update_once(run, u)
            assert outcome is not None
            run.tell(outcome)
        run.save(2)
        run.close_observers()
        went_on = run_of(execution={"engine": second}, resume={"run": str(run.folder)})
        assert went_on.replica.plain_engine.name == second and went_on.first_update == 3
        outcome = update_once(went_on, 3)
        assert outcome is not None
        went_on.replica.adapters.check_views()
        ends.append((outcome.record.loss_nats, outcome.record.grad_norm_pre_clip))
        went_on.close_observers()
    assert ends[1][0] == pytest.approx(ends[0][0], rel=2e-3) and ends[1][1] == pytest.approx(
        ends[0][1], rel=5e-2
    )
