"""A stop ends a run with its checkpoint, soon, with the command to resume on the last line."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from launching import write_rows

import train_loop
from train_loop import train


@pytest.fixture
def words(tmp_path: Path, tiny_llama: Path) -> list[str]:
    return [
        f"model.id={tiny_llama}",
        f"data.source={write_rows(tmp_path / 'rows.jsonl', 37)}",
        "data.template=chat",
        "data.max_tokens=96",
        "lora.r=4",
        "batch.size=2",
        "batch.accumulation=1",
        "schedule.updates=9",
        "execution.precision=fp32",
        "execution.preflight=false",
        "evaluation.samples=0",
        f"run.dir={tmp_path}",
        "run.name=stopped",
    ]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGHUP, 0)]
)
def test_a_signal_in_a_run_leaves_the_resume_line_last(
    number, code, words, tmp_path, monkeypatch, capfd
):
    genuine = train_loop.run_passes

    def run_passes(replica, rows, window, *more):
        if window.update == 3:
            os.kill(os.getpid(), number)
        return genuine(replica, rows, window, *more)

    monkeypatch.setattr(train_loop, "run_passes", run_passes)
    before = signal.getsignal(number)
    assert train_loop.main(words) == code
    assert signal.getsignal(number) == before
    said = capfd.readouterr()
    assert "report " in said.out
    assert "Traceback" not in said.err
    last = said.err.rstrip().splitlines()[-1]
    assert last.startswith("stopped after update 2; resume: accelerate launch ")
    assert last.endswith(f"--resume {tmp_path / 'stopped'}")
    assert "--resume" not in said.out  # once is enough
    assert (tmp_path / "stopped/checkpoints/update_000002").is_dir()


def test_a_signal_before_update_1_leaves_nothing(words, tmp_path, monkeypatch, capfd):
    from glassloop.loop import build

    def load(*_args, **_options):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(build, "load_replica", load)
    assert train_loop.main(words) == 130
    said = capfd.readouterr().err
    assert "stopped by SIGINT before the first update: nothing was trained" in said
    assert "Traceback" not in said
    assert not (tmp_path / "stopped").exists()


@pytest.mark.parametrize(
    ("passes", "answers"), [(2, 0), (1, 2)], ids=["in the losses", "in the answers"]
)
def test_a_stop_drops_an_evaluation_and_the_run_ends_with_a_checkpoint(run_of, passes, answers):
    """At once, not after it: a launcher kills 30 seconds after its signal."""
    run = run_of(
        data={"heldout": 0.1},
        schedule={"updates": 6},
        evaluation={"every_updates": 2, "generate_rows": answers, "max_new_tokens": 4},
    )
    losses = iter(range(100))
    genuine = run.replica.plain_engine.forward

    def forward(p):
        if run.at == 2 and not torch.is_grad_enabled() and next(losses) == 0:
            run.stop.ask("SIGTERM")
        return genuine(p)

    run.replica.plain_engine.forward = forward
    run.heldout = run.heldout[: 2 * passes]  # after the last pass the next look is an answer's
    assert train(run) == 0
    run.close_observers()
    events = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events][-3:] == ["warning", "checkpoint", "stopped"]
    assert "evaluation after update 2 was dropped: a stop was asked" in events[-3]["message"]
    assert events[-3]["command"] == f"glassloop evaluate {run.folder}"
    assert events[-1]["update"] == 2
    evaluations = (run.folder / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in evaluations] == [0]
