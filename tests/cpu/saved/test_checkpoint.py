"""Checkpoints: what was saved comes back byte for byte, nothing torn or foreign is restored, no
death loses the last one."""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from checkpoints import CPU, TEMPLATE, Bench, base_model, bench, load, save, state_at
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoTokenizer

from glassloop.disk import publish as folders
from glassloop.formula.optim import make_optimizer
from glassloop.saved import checkpoint
from glassloop.saved import state as snapshots
from glassloop.saved.checkpoint import (
    save_checkpoint,
)

# What comes back


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw", "sgd"])
def test_a_resumed_run_is_the_uninterrupted_one_byte_for_byte(
    name: str, tmp_path: Path, tokenizer: Any
) -> None:
    one = bench(name)
    one.update(3)
    state = state_at(3, details={"windows": [1.5, None]}, attempt=2, loss_scale=1024.0)
    saved = save(tmp_path, one, tokenizer, state)
    at_save = one.bits()
    one.update(2)
    again = bench(name, seed=9)
    again.update(1)
    assert load(saved.path, again) == replace(state, serial=1)
    assert again.bits() == at_save
    again.update(2)
    assert again.bits() == one.bits()
    again.adapters.check_views()


def test_eight_bit_states_are_stored_as_eight_bits(at_40: Path) -> None:
    tensors = load_file(at_40 / "optimizer.safetensors")
    assert tensors["state1"].dtype == tensors["state2"].dtype == torch.uint8
    assert sorted(tensors) == ["absmax1", "absmax2", "qmap1", "qmap2", "state1", "state2"]


def test_a_parameter_too_small_for_eight_bits_comes_back_too() -> None:
    flat = torch.nn.Parameter(torch.ones(256))
    optimizer = make_optimizer(
        "adamw_8bit", flat, lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0
    )
    flat.grad = torch.ones(256)
    optimizer.step()
    tensors, plain = snapshots.optimizer_state(optimizer, flat)
    assert tensors["state1"].dtype == torch.float32
    built = snapshots.built_optimizer_state(optimizer, flat, tensors, plain)
    assert built.keys() == optimizer.state[flat].keys()
    assert torch.equal(built["state2"], optimizer.state[flat]["state2"])


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw", "sgd"])
def test_a_run_saved_before_its_first_step_has_no_optimizer_state(
    name: str, tmp_path: Path, tokenizer: Any
) -> None:
    one = bench(name)
    saved = save(tmp_path, one, tokenizer, state_at(0))
    one.update(1)
    expected = one.bits()
    load(saved.path, one)
    assert not one.optimizer.state
    one.update(1)
    assert one.bits() == expected
    again = bench(name, seed=9)
    again.update(1)
    load(saved.path, again)
    again.update(1)
    assert again.bits() == one.bits()


def test_the_state_of_every_rank_is_its_own(tmp_path: Path, trained: Bench, tokenizer: Any) -> None:
    rngs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        rngs.append(snapshots.rng_state(CPU))
    arguments = dict(
        adapters=trained.adapters,
        peft_model=trained.model,
        tokenizer=tokenizer,
        chat_template=TEMPLATE,
    )
    arguments |= dict(
        base_id="org/base", base_revision=None, optimizer=trained.optimizer, rng_states=rngs, keep=1
    )
    saved = save_checkpoint(tmp_path, state_at(1), **arguments)  # type: ignore[arg-type]
    for rank, seed in enumerate((1, 2)):
        load(saved.path, trained, rank=rank)
        drawn = torch.rand(4)
        torch.manual_seed(seed)
        assert torch.equal(drawn, torch.rand(4))


def test_peft_loads_the_adapter_and_gives_the_same_logits(at_40: Path, trained: Bench) -> None:
    ids = torch.arange(12)[None]  # (1, 12)
    trained.model.eval()
    loaded = PeftModel.from_pretrained(base_model(), at_40).eval()
    with torch.no_grad():
        expected, logits, plain = (
            model(input_ids=ids).logits for model in (trained.model, loaded, base_model())
        )
    assert torch.equal(logits, expected)
    assert not torch.equal(logits, plain)
    described = json.loads((at_40 / "adapter_config.json").read_text())
    assert (described["base_model_name_or_path"], described["revision"]) == ("org/base", "0123abc")
    assert described["inference_mode"] is True


def test_adapter_names_are_pefts_own_and_no_base_weight_is_saved(
    at_40: Path, trained: Bench
) -> None:
    saved = load_file(at_40 / "adapter_model.safetensors")
    assert (
        saved.keys() == get_peft_model_state_dict(trained.model, save_embedding_layers=False).keys()
    )
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    assert all(".lora_" in name for name in saved)
    held = sum(tensor.numel() for tensor in saved.values())
    assert held == trained.adapters.trainable
    weights = sum(path.stat().st_size for path in at_40.glob("*.safetensors"))
    assert (
        weights < 6 * trained.adapters.flat.numel() + 20_000
    )  # 4 bytes a weight, 2 of optimizer state, names


@pytest.mark.parametrize(
    ("name", "saved"),
    [
        ("m.q_proj.lora_A.default.weight", "m.q_proj.lora_A.weight"),
        ("m.embed.lora_embedding_A.default", "m.embed.lora_embedding_A"),
        ("m.default.q_proj.lora_B.default.weight", "m.default.q_proj.lora_B.weight"),
        ("m.default_q.lora_B.default.weight", "m.default_q.lora_B.weight"),
    ],
)
def test_only_the_adapters_name_is_left_out_of_a_name(name: str, saved: str) -> None:
    assert checkpoint.saved_name(name) == saved


def test_the_tokenizer_comes_with_the_given_template_and_keeps_its_own(
    at_40: Path, tokenizer: Any
) -> None:
    loaded = AutoTokenizer.from_pretrained(at_40)
    assert loaded.chat_template == TEMPLATE == (at_40 / "chat_template.jinja").read_text()
    turns = [{"role": "user", "content": "a b"}]
    assert loaded.apply_chat_template(turns, tokenize=False) == "<s>a b"
    assert loaded("a b").input_ids == tokenizer("a b").input_ids == [3, 4]
    assert tokenizer.chat_template == "the tokenizer's own"


def test_a_checkpoint_holds_json_safetensors_and_text_only(at_40: Path) -> None:
    kinds = {path.suffix for path in at_40.iterdir() if path.name != "SHA256SUMS"}
    assert kinds == {".json", ".safetensors", ".jinja"}
    for module in (checkpoint, folders, snapshots):
        source = Path(str(module.__file__)).read_text()
        assert "torch.load(" not in source.replace("safetensors.torch.load(", "")
        assert "import pickle" not in source


def test_sums_are_those_of_sha256sum(at_40: Path) -> None:
    lines = (at_40 / "SHA256SUMS").read_text().splitlines()
    assert sorted(line.split("  ")[1] for line in lines) == sorted(
        p.name for p in at_40.iterdir() if p.name != "SHA256SUMS"
    )
    if shutil.which("sha256sum"):
        assert os.system(f"cd {at_40} && sha256sum -c --strict --quiet SHA256SUMS") == 0


# Random numbers


def test_random_numbers_come_back_in_the_middle_of_a_pair_of_normals() -> None:
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
    random.gauss(0, 1)
    numpy.random.normal()
    torch.randn(3)
    state = json.loads(json.dumps(snapshots.rng_state(CPU)))
    drawn = [(random.gauss(0, 1), numpy.random.normal(), torch.randn(3).tolist()) for _ in range(2)]
    snapshots.restore_rng(state, CPU)
    assert [
        (random.gauss(0, 1), numpy.random.normal(), torch.randn(3).tolist()) for _ in range(2)
    ] == drawn


@pytest.mark.parametrize(
    "broken", [{}, [], None, {"python": 1, "numpy": 2, "torch": 3, "cuda": None}]
)
def test_malformed_random_numbers_are_refused_and_change_nothing(broken: Any) -> None:
    before = snapshots.rng_state(CPU)
    with pytest.raises(ValueError, match="malformed state of random numbers"):
        snapshots.restore_rng(broken, CPU)
    assert snapshots.rng_state(CPU) == before
