"""Starts that would not do what was asked are refused, with the line to type."""

from __future__ import annotations

import pytest
import torch

from glassloop.config.arguments import parse
from glassloop.loop import launch


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "LOCAL_RANK",
        "RANK",
        "WORLD_SIZE",
        "ACCELERATE_MIXED_PRECISION",
        "ACCELERATE_USE_CPU",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)


@pytest.mark.usefixtures("two_gpus")
def test_two_visible_gpus_without_a_launcher_are_refused_with_both_lines() -> None:
    with pytest.raises(ValueError, match="2 GPUs are visible, but no launcher") as refusal:
        launch.check_launch(parse(["r1_8b_scam"]))
    assert "accelerate_configs/ddp_2gpu.yaml train_loop.py" in str(refusal.value)
    assert "accelerate_configs/single_gpu.yaml train_loop.py" in str(refusal.value)


@pytest.mark.usefixtures("two_gpus")
def test_a_launcher_makes_the_same_start_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    launch.check_launch(parse(["r1_8b_scam", "batch.ranks=2"]))
    with pytest.raises(ValueError, match=r"batch\.ranks = 3, but 2 processes were started"):
        launch.check_launch(parse(["r1_8b_scam", "batch.ranks=3", "batch.rows_per_update=18"]))


@pytest.mark.usefixtures("two_gpus")
def test_bf16_on_a_card_without_it_names_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(ValueError, match="Tesla T4 has no bf16 units; use fp16"):
        launch.check_launch(parse(["r1_8b_scam"]))


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("execution.precision=fp16", "fp16 needs a CUDA device"),
        ("optimizer.name=paged_adamw_8bit", "paged_adamw_8bit needs a CUDA device"),
        ("model.attention=flash_attention_2", "flash_attention_2 needs a CUDA device"),
    ],
)
def test_what_a_cpu_cannot_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, word: str, said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=said):
        launch.check_launch(parse(["r1_8b_scam", word]))


@pytest.mark.parametrize("kind", launch.REFUSED_LAUNCHES)
def test_launch_settings_that_hide_the_formula_are_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    class Asked:
        distributed_type = kind

    monkeypatch.setattr(launch, "Accelerator", lambda **_: Asked())
    with pytest.raises(ValueError, match="the launch file asks for") as refusal:
        launch.make_accelerator(parse(["smollm2_demo"]))
    assert launch.REFUSED_LAUNCHES[kind] in str(refusal.value)
    if kind == "FSDP":
        assert "bnb_4bit_quant_storage=bf16 with bf16 adapters" in str(refusal.value)


@pytest.mark.parametrize("name", launch.ASKED_BY)
def test_a_launch_by_environment_is_refused_before_its_package_is_imported(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "true")
    with pytest.raises(ValueError, match=rf"{name}=true .* unset {name}") as refusal:
        launch.check_launch(parse(["smollm2_demo"]))
    assert launch.REFUSED_LAUNCHES[launch.ASKED_BY[name]] in str(refusal.value)


def test_a_lone_process_may_be_given_a_backend(run_of) -> None:
    """It has nobody to speak with: no process group is made, and none is missed."""
    run = run_of(execution={"backend": "gloo", "precision": "fp32"})
    assert run.replica.ranks == 1 and not torch.distributed.is_initialized()


def test_segments_grow_on_a_gpu_unless_the_environment_says_how_memory_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        torch._C, "_accelerator_setAllocatorSettings", asked.append
    )  # fails where a newer torch has no such call
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    launch.grow_segments()
    assert asked == []  # no GPU
    monkeypatch.setattr(launch, "on_cuda", lambda: True)
    launch.grow_segments()
    assert asked == ["expandable_segments:True"]
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    launch.grow_segments()
    assert len(asked) == 1
