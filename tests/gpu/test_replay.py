"""Replays on one CUDA device.

fp16 overflow is blamed on precision; NF4 is within noise.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from planted import spoiled_base

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def replayed(capsys: pytest.CaptureFixture[str], run: Path, update: int, *words: str) -> dict:
    from accelerate.state import AcceleratorState

    from glassloop.cli.__main__ import main

    AcceleratorState._reset_state(True)
    capsys.readouterr()
    code = main(["replay", str(run), "--update", str(update), *words, "--json"])
    printed = capsys.readouterr()
    assert code == 0, printed.out + printed.err
    return json.loads(printed.out)


def carried_out(run, updates: int) -> Path:
    from train_loop import update_once

    for u in range(1, updates + 1):
        outcome = update_once(run, u)
        assert outcome is not None
        run.tell(outcome)
    run.close_observers()
    return run.folder


def test_an_activation_beyond_fp16_is_named_and_the_verdict_is_precision(
    run_of, tiny_llama, tmp_path, capsys
):
    def mute(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.1.mlp.down_proj.weight"][:, 5] = (
            0  # what channel 5 holds does not matter, unless it is infinite
        )

    model = spoiled_base(tiny_llama, tmp_path / "model", mute)
    run = run_of(
        model={"id": str(model), "quantization": "none"},
        execution={"precision": "fp16", "preflight": False},
        stability={"on_nonfinite": "skip", "initial_loss_scale": 1024.0},
    )
    for name, place in run.replica.adapters.slices.items():
        matrix = place.of(run.replica.adapters.flat.data)
        if "layers.1.mlp.up_proj.lora_B" in name:
            matrix[5] = 1e7
        elif "layers.1.mlp.down_proj.lora_A" in name:
            matrix[:, 5] = 0
    folder = carried_out(run, 1)
    found = replayed(capsys, folder, 1, "--bisect", "--try")
    assert found["reproduces"]
    assert found["bisection"]["layer"]["layer"] == 1
    assert "up_proj" in found["bisection"]["layer"]["name"]
    assert found["trials"]["verdict"]["kind"] == "precision"
    assert found["next"].endswith("--at 0 execution.precision=fp32")


@pytest.mark.parametrize("deterministic", [False, True])
def test_an_nf4_update_in_bf16_comes_back_within_the_noise_floor(run_of, capsys, deterministic):
    run = run_of(
        lora={"dropout": 0.1},
        record={"capture_updates": [4]},
        execution={"deterministic": deterministic},
    )
    folder = carried_out(run, 5)
    try:
        for update in (4, 5):  # from a capsule, and from the beginning
            found = replayed(capsys, folder, update)
            assert found["reproduces"], found["compared"][:2]
            if deterministic:
                assert found["bit_for_bit"]
                assert found["noise_floor"] == {"loss": 0, "grad_norm": 0, "gradient": 0}
    finally:
        torch.use_deterministic_algorithms(False)
