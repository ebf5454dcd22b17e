"""What `fused` gives up, one thing after another, when a GPU has no room."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest

from glassloop.loop import spending as room

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton, which has no build for this system",
)


@pytest.mark.parametrize(("base", "streams"), [("auto", True), ("gpu", False), (1, False)])
def test_layers_kept_go_first_and_the_base_last(run_of, base, streams) -> None:
    run = run_of(
        execution={"engine": "fused", "precision": "fp32"},
        model={"quantization": "nf4"},
        memory={"base": base},
    )
    engine = run.replica.plain_engine
    room.use_tiers(run, replace(engine.tiers, kept=2))
    asked = engine.tiers.streamed
    steps = []
    while room.fewer_kept(run, 1, "out of memory"):
        steps.append((engine.tiers.kept, engine.tiers.streamed))
        assert len(steps) < 5
    assert steps == [(1, asked), *([(1, 2)] if streams else [])]
    assert run.tiers["streamed"] == engine.tiers.streamed


def test_the_reference_engine_has_nothing_to_give_up(run_of) -> None:
    assert not room.fewer_kept(run_of(), 1, "out of memory")
