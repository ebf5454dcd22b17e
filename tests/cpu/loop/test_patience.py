"""evaluation.patience ends a run at its best held-out loss, alike when it is resumed on the way."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from launching import write_rows

import train_loop
from glassloop.config.arguments import from_values, parse
from glassloop.health.patience import HeldOut, heldout_from
from glassloop.record.reading import read_run
from glassloop.report.payload import payload
from glassloop.report.summary import summarise
from glassloop.use.trained import open_trained


def course(*losses: float) -> HeldOut:
    found = HeldOut()
    for number, loss in enumerate(losses):
        found = found.after(5 * number, loss)
    return found


def test_only_a_lower_finite_loss_after_update_1_is_better() -> None:
    assert course(1.0, 3.0, 2.0, 2.0, float("nan"), 2.5) == HeldOut(2.0, 10, 3, 25)
    assert course(1.0, float("nan"), float("inf")) == HeldOut(None, None, 2, 10)
    assert course(1.0) == HeldOut()


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_patience_runs_out_after_as_many_evaluations(patience: int) -> None:
    ends = [course(9.0, 3.0, *[3.0] * n).exhausted(patience) for n in range(5)]
    assert ends == [n >= patience for n in range(5)]
    assert not course(*[3.0] * 9).exhausted(None)


def test_its_state_survives_a_checkpoint_and_a_damaged_one_is_named() -> None:
    for one in (HeldOut(), course(1.0, 3.0, 0.1 + 0.2, 4.0)):
        assert heldout_from(json.loads(json.dumps(one.state()))) == one
    sound = HeldOut(1.0, 5, 1, 10).state()
    for odd in ({}, [], sound | {"x": 1}, sound | {"update": -1}, sound | {"worse_in_a_row": None},
                sound | {"best_nats": float("nan")}, sound | {"best_update": True}):  # fmt: skip
        with pytest.raises(ValueError, match=r"details\.heldout is malformed"):
            heldout_from(odd)


def test_patience_without_evaluations_is_refused_and_peers_names_lead_to_it() -> None:
    with pytest.raises(ValueError, match=r"patience = 2 counts evaluations.*every_updates"):
        from_values({"evaluation": {"patience": 2}})
    with pytest.raises(ValueError, match=r"it is called evaluation\.patience here"):
        parse(["smollm2_demo", "early_stopping_patience=3"])


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> list[str]:
    folder = tmp_path_factory.mktemp("patience")
    return [
        f"model.id={tiny_llama}", f"data.source={write_rows(folder / 'rows.jsonl', 37)}",
        "data.template=chat", "data.max_tokens=96", "data.heldout=0.4", "lora.r=4",
        "batch.size=4", "batch.accumulation=1", "schedule.updates=60",
        "schedule.warmup_updates=2", "schedule.kind=constant", "optimizer.lr=4e-2",
        "execution.precision=fp32", "execution.preflight=false", "execution.deterministic=true",
        "evaluation.every_updates=4", "evaluation.patience=2", "evaluation.generate_rows=0",
        "evaluation.samples=1", "evaluation.max_new_tokens=2", "checkpoint.every_updates=3",
        f"run.dir={folder}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def ended(words: list[str]) -> Path:
    """A run whose held-out loss rises before its updates are done."""
    assert train_loop.main([*words, "run.name=whole"]) == 0
    return Path(words[-1].removeprefix("run.dir=")) / "whole"


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_the_run_ends_at_the_second_evaluation_after_its_best(ended: Path) -> None:
    run = read_run(ended)
    losses = [one["loss_nats"] for one in run.evaluations if one["update"]]
    best = losses.index(min(losses))
    assert 4 * (best + 1) > 4 and len(losses) == best + 3
    done = 4 * (best + 3)
    assert run.updates[-1]["update"] == done < 60
    assert run.ended_early and run.end is not None
    assert run.end["details"]["early"] == {"patience": 2, "best_update": 4 * (best + 1)}
    assert (
        f"after update {4 * (best + 1)}, whose checkpoint is the run's result"
        in (run.end["message"])
    )
    assert run.end["command"].endswith("evaluation.patience=null")
    assert (ended / f"checkpoints/update_{done:06d}").is_dir()
    assert open_trained(ended).checkpoint.name == f"update_{4 * (best + 1):06d}"
    assert {sample["update"] for sample in run.samples} == {0, done}


def test_plan_and_report_name_the_condition_and_the_best(ended: Path) -> None:
    run = read_run(ended)
    assert json.loads((ended / "plan.json").read_text())["ends_early"] == {
        "patience": 2,
        "every_updates": 4,
    }
    first = summarise(run)[0]
    assert (first.topic, first.verdict) == ("ended", "good")
    assert "ended early" in first.text
    best = run.end["details"]["early"]["best_update"]  # type: ignore[index]
    learned = next(say for say in summarise(run) if say.topic == "learned")
    assert f" after update {best}, on " in learned.text and learned.update == best
    assert payload(run)["best"] == run.end["details"]["early"]["best_update"]  # type: ignore[index]


def test_a_run_stopped_on_the_way_ends_at_the_same_update_with_the_same_bits(
    ended: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop asked in an update whose evaluation is due: that evaluation comes after the resume."""
    stop_at = read_run(ended).end["details"]["early"]["best_update"]  # type: ignore[index]
    genuine = train_loop.update_once

    def update_once(run: Any, u: int) -> Any:
        if u == stop_at and run.config.resume.run is None:
            outcome = genuine(run, u)
            assert outcome is not None
            run.stop.asked, run.stop.by = True, "the test"
            return dataclasses.replace(outcome, stop=True)
        return genuine(run, u)

    monkeypatch.setattr(train_loop, "update_once", update_once)
    folder = ended.parent / "stopped"
    train_loop.main([*words, "run.name=stopped"])
    assert lines(folder, "metrics.jsonl")[-1]["update"] == stop_at
    assert stop_at not in {one["update"] for one in lines(folder, "evaluations.jsonl")}
    assert train_loop.main(["--resume", str(folder)]) == 0
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        ours, theirs = lines(folder, name), lines(ended, name)
        for record in (*ours, *theirs):
            for key in [k for k in record if k.endswith("_s") or k in ("attempt", "seconds")]:
                del record[key]
        assert ours == theirs, name
    assert open_trained(folder).checkpoint.name == open_trained(ended).checkpoint.name
    last = f"checkpoints/{sorted(p.name for p in (ended / 'checkpoints').glob('update_*'))[-1]}"
    for file in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert (folder / last / file).read_bytes() == (ended / last / file).read_bytes()


def test_a_run_that_ended_early_resumes_only_with_more_patience(
    ended: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train_loop.main(["--resume", str(ended)]) == 2
    said = capfd.readouterr().err
    assert re.search(r"ended early after update \d+.*set evaluation\.patience to more than 2", said)
