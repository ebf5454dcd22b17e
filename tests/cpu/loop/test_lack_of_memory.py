"""What `fused` gives up, one thing after another, when a GPU has no room."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

from glassloop.loop import spending as room
from glassloop.loop.guard import Guard
from glassloop.loop.process import begun
from glassloop.record.jsonl import read_jsonl
from train_loop import train

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


@pytest.mark.parametrize("refuses", [False, True])
def test_a_kept_layer_goes_where_the_host_has_room_for_it(run_of, monkeypatch, refuses) -> None:
    """A host that refuses leaves the tiers as they are."""
    run = run_of(execution={"engine": "fused", "precision": "fp32"}, model={"quantization": "nf4"})
    engine = run.replica.plain_engine
    room.use_tiers(run, replace(engine.tiers, kept=2, host="all"))
    engine.make_room(engine.tiers, 100)
    assert len(engine.host.slots) == 0
    if refuses:
        monkeypatch.setattr(room, "room_refused", lambda *_: "memory.host_gib: too little")
    assert room.fewer_kept(run, 1, "out of memory") is not refuses
    assert engine.tiers.kept == (2 if refuses else 1)
    assert len(engine.host.slots) == (0 if refuses else 1)


def test_the_reference_engine_has_nothing_to_give_up(run_of) -> None:
    assert not room.fewer_kept(run_of(), 1, "out of memory")


def short_once(run, error: Exception) -> None:
    """Let the first pass of a run end with this error."""
    genuine, left = run.replica.engine, [error]

    def engine(p):
        if left:
            raise left.pop()
        return genuine(p)

    run.replica.engine = engine


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_libraries_that_ask_the_driver_themselves_lack_memory_as_torch_does(run_of, said) -> None:
    run = run_of(schedule={"updates": 1, "warmup_updates": 1}, execution={"preflight": False})
    short_once(run, RuntimeError(said))
    assert train(run) == 0
    events = list(read_jsonl(run.folder / "events.jsonl"))
    assert [one["update"] for one in events if one["kind"] == "out_of_memory"] == [1]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_card_too_small_for_the_base_is_a_refusal_with_a_cure(monkeypatch, capsys, rank) -> None:
    """Said by the rank whose card it is."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", rank)

    def build(said: str):
        raise torch.OutOfMemoryError(said) if "memory" in said else RuntimeError(said)

    with Guard() as guard:
        found = begun(guard, lambda: build("CUDA out of memory. Tried to allocate 2 GiB\nmore"))
    said = capsys.readouterr()
    told = said.out + said.err
    assert found == 2 and "Traceback" not in told
    assert f"refused: the card of rank {rank} has no memory left" in told
    assert "Tried to allocate 2 GiB. See" in told and "memory.base=host" in told
    with Guard() as guard, pytest.raises(RuntimeError, match="a fault"):
        begun(guard, lambda: build("a fault"))


def test_another_error_of_a_pass_is_no_lack_of_memory(run_of) -> None:
    run = run_of(schedule={"updates": 1, "warmup_updates": 1}, execution={"preflight": False})
    short_once(run, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        train(run)


def test_a_lack_of_memory_has_torchs_own_class_too() -> None:
    assert issubclass(torch.OutOfMemoryError, RuntimeError)  # train_loop catches that
