"""LoRA+ in a run: said in the header, recorded, and what a step does."""

from __future__ import annotations

import torch

from train_loop import update_once


def test_b_s_rate_is_said_recorded_and_applied(run_of) -> None:
    changes = {}
    for ratio in (1, 4):
        run = run_of(
            optimizer={"b_lr_ratio": ratio, "lr": 1e-4, "name": "adamw"},
            schedule={"warmup_updates": 0, "updates": 20},
            execution={"precision": "fp32"},
        )
        assert any("B learns at 4 x lr (LoRA+)" in line for line in run.header) == (ratio == 4)
        run.begin()
        before = run.replica.adapters.flat.detach().clone()
        outcome = update_once(run, 1)
        assert outcome is not None
        record = outcome.record
        assert record.b_lr == (4 * record.lr if ratio == 4 else None)
        changes[ratio] = run.replica.adapters.flat.detach() - before
        slices = run.replica.adapters.slices
        run.close()
    for name, place in slices.items():
        factor = 4 if ".lora_B." in name else 1
        assert torch.allclose(
            place.of(changes[4]), factor * place.of(changes[1]), rtol=1e-3, atol=1e-8
        ), name
