"""A run whose base moves between card and host, resumed in between, keeps its bits."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import yaml

from glassloop.config.arguments import parse
from glassloop.loop import build

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton, which has no build for this system",
)
FUSED = {"execution": {"engine": "fused", "precision": "fp32"}, "model": {"quantization": "nf4"}}


def test_updates_are_equal_to_the_bit_wherever_the_base_lies(run_of) -> None:
    from accelerate.state import AcceleratorState

    from train_loop import update_once

    run = run_of(**FUSED, memory={"base": "host"})
    for update, (base, streamed) in enumerate((("host", 2), ("gpu", 0), (1, 1)), 1):
        if update > 1:
            AcceleratorState._reset_state(True)
            run = build.build_run(parse(["--resume", str(run.folder), f"memory.base={base}"]))
        assert run.tiers is not None and run.tiers["streamed"] == streamed
        told = f"4-bit weights of {streamed} streamed" if streamed else "2 of 2 layers kept"
        assert any(told in line for line in run.header)
        outcome = update_once(run, update)
        assert outcome is not None and outcome.record.action == "applied"
        run.tell(outcome)
        run.save(update)
        run.close_observers()
        assert yaml.safe_load((run.folder / "config.yaml").read_text())["memory"]["base"] == base
    alone = run_of(**FUSED, memory={"base": "gpu"})
    for update in (1, 2, 3):
        update_once(alone, update)
    wanted = alone.replica.adapters.parameters
    for name, weight in run.replica.adapters.parameters.items():
        assert torch.equal(weight, wanted[name]), name


def test_the_reference_engine_refuses_a_base_on_the_host(run_of) -> None:
    with pytest.raises(ValueError, match=r"memory\.base = host: only execution\.engine=fused"):
        run_of(model={"quantization": "nf4"}, memory={"base": "host"})
