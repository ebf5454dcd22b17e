"""What is said and done where a run goes on otherwise than it began, and where the disk refuses a
checkpoint."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from glassloop.config import Config, as_dict
from glassloop.config.arguments import from_values, parse
from glassloop.loop.build import build_run
from glassloop.plan.outlook import plan_of
from glassloop.plan.steps import StepPlan
from glassloop.saved.changes import changes
from glassloop.saved.checkpoint import read_state
from glassloop.saved.resuming import reshaped, with_past
from glassloop.saved.run_state import RunState
from train_loop import train, update_once

BASE = ("model.id", "model.revision")  # may differ: the base's hash says what it is


def saved(update: int = 20, ranks: int = 2, **sections: Any) -> RunState:
    return RunState(update, 0, ranks, "sha256:base", as_dict(Config.model_validate(sections)))


def plan(config: Config, ranks: int = 2) -> StepPlan:
    return plan_of(config, 600, ranks)


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_rows_of_an_update_stay_with_any_number_of_ranks_that_divides_them(
    ranks: int, micro_batches: int
) -> None:
    config = reshaped(
        Config.model_validate({"batch": {"ranks": 2}}), saved(batch={"ranks": 2}), ranks
    )
    there = plan(config, ranks)
    assert (there.rows_per_update, there.size, there.accumulation) == (16, 2, micro_batches)
    assert config.batch.ranks is None


def test_ranks_that_do_not_divide_the_rows_are_refused_with_sizes_that_do() -> None:
    with pytest.raises(
        ValueError,
        match=r"rows_per_update = 16 is not a multiple of batch\.size x ranks = 2 x 16: "
        r"batch\.size could be 1",
    ):
        reshaped(Config(), saved(), 16)


def test_more_ranks_are_told_that_some_have_no_saved_random_numbers() -> None:
    config = reshaped(Config.model_validate({"resume": {"run": "x", "reshape": True}}), saved(), 4)
    allowed, told = changes(config, saved(), plan(config, 4), {})
    assert allowed == (*BASE, "batch.size", "batch.accumulation", "batch.rows_per_update")
    assert told[0].kind == "reshaped"
    assert "resumed with 4 ranks instead of 2: the same 16 rows" in told[0].message
    assert "ranks 2 to 3 begin with random numbers of their own" in told[0].message


def test_a_longer_run_says_what_it_does_to_the_learning_rate() -> None:
    recorded = saved(schedule={"updates": 60, "warmup_updates": 5})
    config = Config.model_validate({"schedule": {"updates": 120, "warmup_updates": 5}})
    allowed, told = changes(config, recorded, plan(config), {"updates": 60})
    assert allowed == (*BASE, "schedule.updates", "schedule.epochs")
    assert (
        "trains 120 updates instead of 60, so the learning rate falls later: lr(21) was "
        "0.000143, is 0.000172" in told[0].message
    )
    assert "lr(61) was none, is 0.000103" in told[0].message
    assert told[0].message.endswith("update 20 had 0.000174")


@pytest.mark.parametrize("updates", [60, 40])
def test_the_same_length_is_no_change_and_a_shorter_one_is_not_allowed(updates: int) -> None:
    config = Config.model_validate({"schedule": {"updates": updates}})
    assert changes(config, saved(), plan(config), {"updates": 60}) == (BASE, ())


def test_updates_that_are_done_keep_the_learning_rate_that_they_had() -> None:
    short, long = (plan(Config.model_validate({"schedule": {"updates": n}})) for n in (60, 120))
    joined = with_past(long, json.loads(json.dumps(short.as_dict())), 20)
    assert joined.lr == (*short.lr[:20], *long.lr[20:])
    assert with_past(long, {}, 0) == long


def test_reshape_needs_a_run_and_may_be_said_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"resume\.reshape say how a run resumes"):
        from_values({"resume": {"reshape": True}})
    (tmp_path / "config.yaml").write_text("seed: 7\n")
    assert parse(["--resume", str(tmp_path), "--resume.reshape"]).resume.reshape
    assert not parse(["--resume", str(tmp_path), "--resume.reshape=false"]).resume.reshape


@pytest.mark.parametrize(("on_failure", "done"), [("warn", 6), ("stop", 2)])
def test_a_refused_checkpoint_lets_the_run_go_on_or_ends_it_and_never_exits_with_0(
    run_of: Any, on_failure: str, done: int
) -> None:
    run = run_of(
        checkpoint={"every_updates": 2, "on_failure": on_failure},
        schedule={"updates": 6},
        execution={"preflight": False},
    )
    (run.folder / "checkpoints").write_text("in the way")
    assert train(run) == 1
    run.close_observers()
    assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == done
    events = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    refusals = [event["message"] for event in events if event["kind"] == "warning"]
    assert "update_000002 was not saved" in refusals[0]
    assert (run.folder / "checkpoints").read_text() == "in the way"
    assert ("checkpoint.on_failure = stop" in events[-1]["message"]) == (on_failure == "stop")


def test_a_checkpoint_of_more_ranks_is_restored_on_fewer_and_fewer_on_more(run_of: Any) -> None:
    from glassloop.saved.checkpoint import load_checkpoint
    from glassloop.saved.state import rng_state

    run = run_of()
    run.save(1)
    path = run.folder / "checkpoints/update_000001"
    before = rng_state(run.replica.device)
    shared = {
        "adapters": run.replica.adapters,
        "optimizer": run.replica.optimizer,
        "base_hash": read_state(path).base_hash,
        "config": as_dict(run.config),
    }
    with pytest.raises(
        ValueError,
        match=r"saved by 1 ranks, this run has 2: start 1 .* or resume with 2: --resume\.reshape",
    ):
        load_checkpoint(path, rank=1, world_size=2, **shared)
    import torch

    torch.rand(3)
    moved = rng_state(run.replica.device)
    load_checkpoint(path, rank=1, world_size=2, reshape=True, **shared)
    assert rng_state(run.replica.device) == moved  # a rank that was not there keeps its own
    load_checkpoint(path, rank=0, world_size=2, reshape=True, **shared)
    assert rng_state(run.replica.device) == before


def resumed(folder: Path, *words: str) -> Any:
    """Built anew, as a process of its own would."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    return build_run(parse(["--resume", str(folder), *words]))


def test_a_damaged_checkpoint_is_passed_over_and_the_run_says_so(
    run_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of()
    for update in (1, 2):
        run.tell(update_once(run, update))
        run.save(update)
    run.close_observers()
    newest = run.folder / "checkpoints/update_000002/optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    again = resumed(run.folder)
    assert again.first_update == 2
    monkeypatch.setattr(again, "evaluate", lambda update: None)
    again.start()
    again.close_observers()
    told = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    (warned,) = [event["message"] for event in told if event["kind"] == "warning"]
    assert f"{newest.parent} is not whole: optimizer.safetensors is corrupt or cut short" in warned
    with pytest.raises(ValueError, match=r"optimizer\.safetensors is corrupt or cut short"):
        resumed(run.folder, "--at", "2")  # asked for by number, it is refused instead


def tracked_ids(folder: Path) -> list[str]:
    """Ids of the Weights & Biases runs below a run's folder, one for each start."""
    return [path.name.rpartition("-")[2] for path in sorted(folder.glob("wandb/offline-run-*"))]


@pytest.mark.parametrize("at", [(), ("--at", "0")], ids=["last", "from the beginning"])
def test_a_run_that_goes_on_stays_one_run_in_weights_and_biases(
    run_of: Any, at: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    asked: list[dict[str, Any]] = []
    genuine = wandb.init
    monkeypatch.setattr(
        wandb, "init", lambda *words, **named: (asked.append(named), genuine(*words, **named))[1]
    )
    run = run_of(tracking={"to": ("wandb",), "wandb_mode": "offline"}, run={"name": "tracked"})
    run.tell(update_once(run, 1))
    run.save(1)
    run.tell(update_once(run, 2))  # done, not saved: it is done again
    run.close_observers()
    time.sleep(1.1)  # wandb names a start's folder by the second
    again = resumed(run.folder, *at)
    again.tell(update_once(again, again.first_update))
    again.close_observers()
    wandb.teardown()
    first, second = asked
    assert (first["id"], first["resume"]) == (None, None)
    assert (second["id"], second["resume"]) == (tracked_ids(run.folder)[0], "allow")
    assert len(tracked_ids(run.folder)) == 2
    assert len(set(tracked_ids(run.folder))) == 1
    assert again.attempt == 2
    assert read_state(run.folder / "checkpoints/update_000001").tracker_ids == {
        "wandb": second["id"]
    }
