"""`glassloop doctor`: checks find their faults, print no secret, explain messages."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from findings import levels, only

from glassloop.config.arguments import parse
from glassloop.doctor import card_checks
from glassloop.doctor import checks as doctor
from glassloop.doctor.findings import NOTE, OK, PROBLEM, Finding
from glassloop.predict.hardware import Present

ROOT = Path(__file__).resolve().parents[3]
CARD = Present("NVIDIA GeForce RTX 4090", 23.99, 23.5, "580.65.06", (8, 9))
OLD = Present("Tesla T4", 15.0, 14.5, "580.65.06", (7, 5))


# --- versions ---


def versions(**changed: str | None):
    tested = {name: high for name, (_, high) in doctor.TESTED.items()}
    return lambda name: {**tested, **changed}.get(name)


def test_versions_that_were_tested_are_fine_and_others_are_named():
    assert {one.level for one in doctor.check_versions(versions())} == {OK}
    old = only(doctor.check_versions(versions(torch="2.9.1+cu128")), PROBLEM)
    assert (old.check, old.cure) == ("torch", "pip install 'torch>=2.11'")
    missing = only(doctor.check_versions(versions(peft=None)), PROBLEM)
    assert missing.check == "peft" and "not installed" in missing.text
    new = only(doctor.check_versions(versions(transformers="6.0.0")), NOTE)
    assert "newer than the tested 5.17 to 5.23" in new.text
    assert levels(doctor.check_versions(versions(transformers="5.23.4")), "transformers") == {OK}


def test_modules_that_every_launch_compiles_anew_are_told(tmp_path):
    never = {"PYTHONDONTWRITEBYTECODE": "1"}
    told = only(doctor.check_compiled(never, tmp_path), NOTE)
    assert told.check == "python" and "each launch compiles torch's modules anew" in told.text
    assert doctor.check_compiled({}, tmp_path) == []
    kept = tmp_path / "__pycache__" / f"__init__.{sys.implementation.cache_tag}.pyc"
    kept.parent.mkdir()
    kept.touch()
    assert doctor.check_compiled(never, tmp_path) == []


@pytest.mark.parametrize(
    ("package", "broken", "whole"),
    [
        ("torch", "2.15.0", "2.14.1"),
        ("transformers", "5.23.0", "5.17.0"),
        ("trl", "1.16.0", "1.15.0"),
        ("datasets", "5.0.0", "4.9.9"),
    ],
)
def test_each_of_unsloths_pins_is_checked(package, broken, whole):
    good = {
        "unsloth": "2026.10.9",
        "torch": "2.11.0",
        "transformers": "5.17.0",
        "trl": "1.15.0",
        "datasets": "4.7.0",
    }
    assert doctor.check_pins(lambda name: (good | {package: whole}).get(name))[0].level == OK
    found = doctor.check_pins(lambda name: (good | {package: broken}).get(name))[0]
    assert (
        found.level == PROBLEM
        and f"{package} {broken}" in found.text
        and "environment of its own" in found.cure
    )
    assert doctor.check_pins(lambda _: None)[0].level == OK


def test_torchs_cuda_is_read_from_its_files():
    import torch

    assert doctor.torch_cuda() == torch.version.cuda
    assert doctor.cuda_in("debug = False\ncuda: Optional[str] = '13.0'\nhip = None\n") == "13.0"
    assert doctor.cuda_in("cuda: Optional[str] = None\nhip: Optional[str] = '6.4'\n") is None


# --- cards ---


def cards(
    words: list[str], present: tuple[Present, ...], cuda: str | None = "13.0", **environ: str
) -> list[Finding]:
    return card_checks.check_cards(parse(words), present, cuda, environ)


def test_a_sound_pair_of_cards_has_no_problem():
    found = cards(["r1_8b_scam", "batch.ranks=2"], (CARD, CARD))
    assert {one.level for one in found} == {OK}
    assert "GPU 1: about" in found[-1].text


def test_a_model_with_joined_projections_is_judged_by_its_own_names(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "model_type": "phi3"}
    (tmp_path / "config.json").write_text(json.dumps(sizes | heads))
    words = [f"model.id={tmp_path}", "data.source=a.csv"]
    for more in ([], ["execution.engine=peft"], ["lora.targets=all-linear"]):
        found = cards([*words, *more], (CARD,))
        found += doctor.check_disk(parse([*words, *more]), {}, free=lambda _: 1 << 40)
        assert {one.level for one in found} == {OK}
    no_such = doctor.check_disk(parse([*words, "lora.targets=q_proj"]), {}, free=lambda _: 0)
    assert "lora.targets = q_proj: " in only(no_such, PROBLEM).text


def test_a_model_that_a_named_engine_does_not_support_is_a_problem(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    config = parse([f"model.id={tmp_path}", "data.source=a.csv", "execution.engine=fused"])
    found = only(doctor.check_engine(config, on_cuda=True), PROBLEM)
    assert "execution.engine = fused: " in found.text and "'qwen3_moe'" in found.text
    assert levels(card_checks.check_cards(config, (CARD,), "13.0", {}), "memory") == set()


def test_a_driver_that_is_too_old_for_torchs_cuda_is_named():
    old = Present(CARD.name, CARD.total_gib, CARD.free_gib, "550.54.15", CARD.capability)
    assert "550.54.15 is older than 580.00" in only(cards(["r1_8b_scam"], (old,)), PROBLEM).text
    assert levels(cards(["r1_8b_scam"], (old,), cuda="12.8"), "driver") == {OK}


def test_a_cpu_build_beside_a_card_is_a_problem_and_without_one_is_not():
    assert "CPU build" in only(cards([], (CARD,), cuda=None), PROBLEM).text
    assert levels(cards([], (), cuda=None), "gpu") == {NOTE}
    assert "nvidia-smi shows none" in cards([], ())[0].text


def test_bf16_on_a_card_without_it_is_a_problem_and_fp16_on_one_with_it_a_note():
    found = only(cards(["r1_8b_scam"], (OLD,)), PROBLEM)
    assert (found.check, found.cure) == ("bf16", "execution.precision=fp16")
    assert levels(cards(["r1_8b_scam", "execution.precision=fp16"], (OLD,)), "bf16") == {OK}
    assert levels(cards(["r1_8b_scam", "execution.precision=fp16"], (CARD,)), "bf16") == {NOTE}
    unknown = Present("NVIDIA Something", 80.0, 80.0, "580.1", None)
    found = cards(["r1_8b_scam"], (unknown,))
    assert levels(found, "bf16") == {NOTE} and levels(found, "memory") == {NOTE}


def test_more_ranks_than_visible_cards_and_hidden_cards_are_named():
    found = only(
        cards(["r1_8b_scam", "batch.ranks=2"], (CARD, CARD), CUDA_VISIBLE_DEVICES="1"), PROBLEM
    )
    assert found.text == "batch.ranks = 2, but 1 GPUs are visible" and "batch.ranks=1" in found.cure
    words = ["r1_8b_scam", "batch.ranks=2", "execution.backend=gloo"]
    assert levels(cards(words, (CARD,)), "ranks") == set()
    mixed = cards(["r1_8b_scam"], (CARD, Present("NVIDIA H200", 140.0, 139.0, "580.1", (9, 0))))
    assert any("different kinds" in one.text for one in mixed)


def test_memory_that_is_taken_already_counts_and_the_cure_keeps_the_rows():
    busy = Present(CARD.name, CARD.total_gib, 8.0, CARD.driver, CARD.capability)
    found = only(cards(["r1_8b_scam", "execution.engine=peft"], (busy,)), PROBLEM)
    assert found.check == "memory" and found.cure == "batch.size=1 batch.rows_per_update=16"
