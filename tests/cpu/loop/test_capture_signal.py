"""SIGUSR1 keeps an update whole, whenever it comes."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import pytest
import torch

from glassloop.record.jsonl import read_jsonl
from train_loop import train


def signalled(run: Any, calls: int, error: type[RuntimeError] | None = None) -> None:
    """Send SIGUSR1 in the engine's n-th call, which then fails if `error` says so."""
    genuine, done = run.replica.engine, 0

    def engine(p: Any) -> Any:
        nonlocal done
        done += 1
        if done == calls:
            os.kill(os.getpid(), signal.SIGUSR1)
            if error is not None:
                raise error("CUDA out of memory")
        return genuine(p)

    run.replica.engine = engine


def asked_for(run: Any) -> list[int]:
    """Updates that were kept because someone asked."""
    facts = [json.loads(path.read_bytes()) for path in run.folder.glob("capsules/*/capsule.json")]
    return sorted(one["update"] for one in facts if one["why"] == "asked")


@pytest.mark.parametrize(("calls", "kept"), [(1, [1]), (2, [1]), (3, [2])])
def test_a_signal_before_or_in_an_update_keeps_it(run_of, calls: int, kept: list[int]) -> None:
    run = run_of(
        schedule={"updates": 3, "warmup_updates": 1},
        batch={"accumulation": 1},
        execution={"preflight": True},
    )
    signalled(run, calls)  # 1: the pass of the pre-flight, which is no update
    assert train(run) == 0
    assert asked_for(run) == kept


def test_a_signal_in_an_update_that_ran_out_of_memory_keeps_its_second_try(run_of) -> None:
    run = run_of(schedule={"updates": 2, "warmup_updates": 1}, execution={"preflight": False})
    signalled(run, 1, torch.OutOfMemoryError)
    assert train(run) == 0
    assert asked_for(run) == [1]


def test_a_signal_that_keeps_nothing_says_so(run_of) -> None:
    run = run_of(
        schedule={"updates": 2, "warmup_updates": 1},
        execution={"preflight": False},
        record={"capsules": 0},
    )
    signalled(run, 1)
    assert train(run) == 0
    said = [event for event in read_jsonl(run.folder / "events.jsonl") if "SIGUSR1" in str(event)]
    assert [event["update"] for event in said] == [1]
    assert "record.capsules = 0 keeps none" in said[0]["message"]
