"""The engine `unsloth` without a GPU and without Unsloth.

Refusals with their reasons, and all that is ours around it, on a stand-in.
"""

from __future__ import annotations

import contextlib
import random
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from unsloth_engines import CPU, ROWS, engine, sums

from glassloop.base.quantised import find_base, load_base
from glassloop.config import LoraConfig, ModelConfig
from glassloop.data.batches import build_pass
from glassloop.engines import unsloth as unsloth_engine


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

    def no_card(hf: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    unsloth.FastLanguageModel.spoil = staticmethod(no_card)
    with pytest.raises(RuntimeError, match=r"^CUDA error"):
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
