"""A resumed run does the next update as an undisturbed one.

8-bit states and weights are equal by bits. On one CUDA device, in NF4 and bf16.
GLASSLOOP_RESUME_ON_CPU=1 does the same on a CPU, without the paged optimizer and fp16.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from glassloop.config.arguments import parse
from glassloop.loop.build import build_run
from glassloop.record.jsonl import read_jsonl
from glassloop.saved import state as snapshots

ON_CPU = bool(os.environ.get("GLASSLOOP_RESUME_ON_CPU"))
CUDA = torch.cuda.is_available() and not ON_CPU
pytestmark = pytest.mark.skipif(
    not (CUDA or ON_CPU), reason="needs a CUDA device, or GLASSLOOP_RESUME_ON_CPU=1"
)
GPU_ONLY = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
BEFORE, AFTER = 4, 3  # updates before the save, and after it


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def updates(run: Any, first: int, last: int) -> list[tuple[Any, Any, str]]:
    from train_loop import update_once

    numbers = []
    for u in range(first, last + 1):
        outcome = update_once(run, u)
        assert outcome is not None
        run.tell(outcome)
        numbers.append(
            (outcome.record.loss_nats, outcome.record.grad_norm_pre_clip, outcome.record.action)
        )
    return numbers


def bits(run: Any) -> dict[str, Any]:
    """Bytes of matrices, optimizer state and random numbers.

    The GPU's random numbers too.
    """
    tensors, plain = snapshots.optimizer_state(run.replica.optimizer, run.replica.adapters.flat)
    tensors |= snapshots.adapter_matrices(run.replica.adapters)
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()} | {
        "plain": plain,
        "rng": snapshots.rng_state(run.replica.device),
        "scale": (run.replica.scale.value, run.replica.scale.finite_updates),
        "windows": run.inspection.state(),
    }


def resumed(folder: Path) -> Any:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    torch.manual_seed(99)  # nothing of the first run is left lying about
    return build_run(parse(["--resume", str(folder)]))


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [
        ("adamw_8bit", "bf16"),
        pytest.param("paged_adamw_8bit", "bf16", marks=GPU_ONLY),
        pytest.param("adamw_8bit", "fp16", marks=GPU_ONLY),
    ],
)
@pytest.mark.parametrize("layout", ["literal", "packed"])
def test_a_resumed_update_is_the_uninterrupted_one_bit_for_bit(
    run_of: Any, optimizer: str, precision: str, layout: str
) -> None:
    run = run_of(
        model={"quantization": "nf4"},
        lora={"r": 16, "alpha": 16, "dropout": 0.1},
        optimizer={"name": optimizer, "lr": 1e-2},
        schedule={"updates": BEFORE + AFTER, "warmup_updates": 2},
        execution={"precision": precision, "deterministic": True, "layout": layout},
        checkpoint={"keep": 9},
    )
    assert run.replica.device.type == ("cuda" if CUDA else "cpu")
    updates(run, 1, BEFORE)
    run.save(BEFORE)
    at_save = bits(run)
    expected = updates(run, BEFORE + 1, BEFORE + AFTER)
    end = bits(run)
    run.close_observers()
    assert end["state1"] != at_save["state1"]  # the optimizer has moved

    path = run.folder / f"checkpoints/update_{BEFORE:06d}"
    stored = safetensors.torch.load_file(path / "optimizer.safetensors")
    assert {stored[name].dtype for name in ("state1", "state2")} == {torch.uint8}
    assert all(stored[name].numpy().tobytes() == at_save[name] for name in stored)

    again = resumed(run.folder)
    assert again.first_update == BEFORE + 1
    restored = bits(again)
    assert [name for name in at_save if restored[name] != at_save[name]] == []
    for name, value in run.replica.optimizer.state[run.replica.adapters.flat].items():
        if isinstance(value, torch.Tensor):
            assert (
                again.replica.optimizer.state[again.replica.adapters.flat][name].device
                == value.device
            )
    if optimizer == "paged_adamw_8bit":
        assert again.replica.optimizer.is_paged
    assert updates(again, BEFORE + 1, BEFORE + AFTER) == expected
    after = bits(again)
    assert [name for name in end if after[name] != end[name]] == []
    again.close_observers()


def test_a_resumed_update_without_deterministic_mode_has_the_same_rows_and_stays_within_rounding(
    run_of: Any,
) -> None:
    """The noise floor of two equal runs, for the docs."""
    run = run_of(
        model={"quantization": "nf4"},
        lora={"r": 16, "alpha": 16, "dropout": 0.1},
        schedule={"updates": BEFORE + AFTER, "warmup_updates": 2},
        execution={"precision": "bf16"},
    )
    updates(run, 1, BEFORE)
    run.save(BEFORE)
    expected = updates(run, BEFORE + 1, BEFORE + AFTER)
    run.close_observers()
    again = resumed(run.folder)
    found = updates(again, BEFORE + 1, BEFORE + AFTER)
    again.close_observers()
    off = max(
        abs(a / b - 1)
        for ours, theirs in zip(found, expected, strict=True)
        for a, b in zip(ours[:2], theirs[:2], strict=True)
    )
    print(f"\nlosses and norms of {AFTER} resumed updates are off by at most {off:.1e}, relative")
    assert off < 2e-2
    lines = read_jsonl(run.folder / "rows.jsonl")
    by_attempt = {
        a: [(x["update"], x["row_id"]) for x in lines if x["attempt"] == a and x["update"] > BEFORE]
        for a in (1, 2)
    }
    assert by_attempt[1] == by_attempt[2]
