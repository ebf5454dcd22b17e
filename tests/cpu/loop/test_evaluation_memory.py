"""A card without room for an evaluation costs the evaluation, not the run."""

from __future__ import annotations

import pytest
import torch

from glassloop.loop import between, evaluation
from glassloop.loop.evaluation import of_all_ranks, unless_stopped
from glassloop.loop.generation import EvaluationLacksMemory
from glassloop.record.jsonl import read_jsonl
from train_loop import train


def full() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_a_run_continues_without_an_evaluation_that_has_no_room(
    run_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(
        data={"heldout": 0.2},
        schedule={"updates": 2, "warmup_updates": 1},
        evaluation={"every_updates": 1, "generate_rows": 1, "max_new_tokens": 2},
        execution={"preflight": False},
    )
    genuine, calls, freed = evaluation.row_losses, [0], []

    def row_losses(*words):
        calls[0] += 1
        if calls[0] == 2:  # after update 1
            full()
        return genuine(*words)

    monkeypatch.setattr(evaluation, "row_losses", row_losses)
    monkeypatch.setattr(between, "free_dropped", freed.append)
    assert train(run) == 0
    (said,) = [
        one for one in read_jsonl(run.folder / "events.jsonl") if "was dropped" in one["message"]
    ]
    assert said["update"] == 1 and said["kind"] == "warning"
    assert "rank 0 ran out of memory: CUDA out of memory. Tried" in said["message"]
    assert "evaluation.generate_batch (now " in said["message"]
    assert said["command"] == f"glassloop evaluate {run.folder}"
    assert freed == [run.replica.device]
    done = [one["update"] for one in read_jsonl(run.folder / "evaluations.jsonl")]
    assert done == [0, 2]
    assert (run.folder / "checkpoints").is_dir()


def test_every_rank_hears_of_the_one_that_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    lack = unless_stopped(full)
    monkeypatch.setattr(evaluation, "gather_objects", lambda own: [own, lack])
    with pytest.raises(EvaluationLacksMemory, match=r"^rank 1 ran out of memory: CUDA out"):
        of_all_ranks("mine", 2)


def test_another_error_of_an_evaluation_is_not_dropped() -> None:
    def fails() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        unless_stopped(fails)
