"""A study's cells run once, also after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import study_stand_in
from launching import run, write_rows
from made_runs import write_run

from glassloop.cli.__main__ import main
from glassloop.record.reading import read_run
from glassloop.study import running
from glassloop.study.cell_state import attempts
from glassloop.study.divergence import where_to_look

ROOT = Path(__file__).resolve().parents[3]
HERE = ROOT / "tests" / "helpers"
TINY = """
name: tiny
question: Does a real run answer?
base: >-
  model.id={model} data.source={rows} data.template=chat data.max_tokens=96 data.heldout=0.2
  batch.size=2 batch.accumulation=2 schedule.updates=4 schedule.warmup_updates=1
  execution.precision=fp32 execution.checkpointing=false lora.r=4 lora.alpha=8
  record.probe_every_updates=1
axes: {{optimizer.lr: [1e-5, 3e-2]}}
seeds: [1, 2]
parallel: 2
claims:
  - {{says: a higher lr learns more, quantity: heldout_loss, expect: lower,
      cell: {{optimizer.lr: 3e-2}}, against: {{optimizer.lr: 1e-5}}}}
"""


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(HERE)]))


@pytest.fixture
def stood_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A study whose cells are stand-ins."""
    monkeypatch.setattr(running, "command", running.command)  # put back afterwards
    study_stand_in.install()
    path = tmp_path / "stood_in.yaml"
    path.write_text(study_stand_in.FILE)
    return path


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def stamps(out: Path) -> dict[str, int]:
    """Return when each cell's records were last written."""
    return {
        path.parent.name: path.stat().st_mtime_ns
        for path in sorted(out.glob("cells/*/metrics.jsonl"))
    }


def started(file: Path, out: Path, *words: str, seconds: float) -> subprocess.Popen:
    command = [
        sys.executable,
        str(HERE / "study_stand_in.py"),
        "study",
        str(file),
        "--out",
        str(out),
        *words,
    ]
    return subprocess.Popen(
        command, env=os.environ | {"STAND_IN_SECONDS": str(seconds)}, stdout=subprocess.DEVNULL
    )


def until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def test_a_study_runs_every_cell_once_and_judges_its_claim(
    stood_in: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "out"
    assert main(["study", str(stood_in), "--out", str(out), "--parallel", "3"]) == 0
    found = results(out)
    assert [cell["state"] for cell in found["cells"]] == ["done"] * 6
    (claim,) = found["claims"]
    assert claim["verdict"] == "supported"
    # differences -0.099, -0.1, -0.099: mean -0.0993333, s 0.000577350, half 4.302653 * s / sqrt(3)
    # = 0.00143422
    assert claim["difference"] == pytest.approx(-0.0993333, abs=1e-6)
    assert (claim["low"], claim["high"]) == pytest.approx((-0.1007676, -0.0978991), abs=1e-6)
    assert len(attempts(out)) == 6 and max(line["beside"] for line in attempts(out)) == 3
    assert found["environments"] == [{"packages": {"torch": "2.13.0"}, "cells": 6}], (
        "another launcher is no other place"
    )
    assert "6 cells on CPU; torch 2.13.0; no commit" in (out / "study.html").read_text()
    assert not list(out.glob("cells/*/checkpoints")), (
        "adapters of dozens of cells would fill a disk"
    )
    said = capsys.readouterr().out
    assert "supported: a higher rank ends lower" in said and "-0.09933" in said


@pytest.mark.thorough
def test_what_is_done_is_not_run_again_and_says_the_same(stood_in: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    words = ["study", str(stood_in), "--parallel", "3"]
    assert main([*words, "--out", str(out)]) == 0
    before, first = stamps(out), results(out)
    assert main([*words, "--out", str(out)]) == 0
    assert stamps(out) == before and len(attempts(out)) == 6
    assert results(out) == first
    assert main([*words, "--out", str(other)]) == 0  # from the file alone
    assert results(other)["claims"] == first["claims"]
    assert main([*words, "--out", str(out), "--again", "--only", "r4-seed1"]) == 0
    after = stamps(out)
    assert [name for name in before if before[name] != after[name]] == ["r4-seed1"]


@pytest.mark.thorough
def test_a_study_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    file, out = tmp_path / "s.yaml", tmp_path / "out"
    file.write_text(study_stand_in.FILE)
    study = started(file, out, seconds=1.5)
    until(lambda: len(attempts(out)) == 2 and len(stamps(out)) == 3)
    study.send_signal(signal.SIGKILL)
    study.wait()
    before = stamps(out)
    third = list(before)[-1] if len(before) == 3 else ""
    assert third and started(file, out, seconds=0).wait(60) == 0
    found = stamps(out)
    assert {name: found[name] for name in before} == before, (
        "neither what was done nor what was under way is run twice"
    )
    assert [cell["state"] for cell in results(out)["cells"]] == ["done"] * 6
    assert len(attempts(out)) == 5, "the cell that outlived its study was waited for"


@pytest.mark.thorough
def test_a_study_that_is_told_to_end_ends_its_cells_and_goes_on(tmp_path: Path) -> None:
    file, out = tmp_path / "s.yaml", tmp_path / "out"
    file.write_text(study_stand_in.FILE)
    study = started(file, out, "--parallel", "2", seconds=30)
    until(lambda: len(stamps(out)) == 2)
    study.send_signal(signal.SIGTERM)
    assert study.wait(30) == 128 + signal.SIGTERM
    for name in stamps(out):
        lock = running._locked(type("Cell", (), {"name": name}), out)
        assert lock is not None, f"{name} still runs"
        os.close(lock)
    assert started(file, out, "--parallel", "3", seconds=0).wait(60) == 0
    assert [cell["state"] for cell in results(out)["cells"]] == ["done"] * 6


@pytest.mark.thorough
def test_a_cell_that_fails_is_recorded_tried_again_and_does_not_stop_the_others(
    stood_in: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "out"
    stood_in.write_text(study_stand_in.FILE.replace("lora.r: [4, 8]", "lora.r: [4, 8, 13]"))
    words = ["study", str(stood_in), "--out", str(out), "--parallel", "3"]
    assert main(words) == 1
    found = {cell["cell"]: cell for cell in results(out)["cells"]}
    assert found["r13-seed1"]["state"] == "absent" and found["r8-seed3"]["state"] == "done"
    assert (
        "exit code 3" in found["r13-seed1"]["why"]
        and "ran out of luck" in found["r13-seed1"]["why"]
    )
    line = next(line for line in attempts(out) if line["cell"] == "r13-seed2")
    assert line["exit_code"] == 3 and "ran out of luck" in line["said"]
    assert "ran out of luck" in capsys.readouterr().out
    assert results(out)["claims"][0]["verdict"] == "supported"
    assert main(words) == 1 and len(attempts(out)) == 9 + 3


@pytest.mark.thorough
def test_a_divergence_is_a_result_with_the_command_that_replays_it(
    stood_in: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    out, asked = tmp_path / "out", []
    text = study_stand_in.FILE.replace("lora.r: [4, 8]", "lora.r: [4, 8, 66]").replace(
        "measure:", "bisect: true\nmeasure:"
    )
    stood_in.write_text(text)

    def answered(words, **_):
        if "glassloop.cli" in words:  # not what looks for a GPU
            asked.append(words)
        return subprocess.CompletedProcess(words, 1, stdout="row train:evil, layer 3\n", stderr="")

    monkeypatch.setattr("glassloop.study.divergence.subprocess.run", answered)
    words = ["study", str(stood_in), "--out", str(out), "--parallel", "3"]
    assert main(words) == 0
    first, *others = results(out)["diverged"]
    assert (first["cell"], first["update"]) == (
        "r66-seed1",
        24,
    )  # the spike, before the update that is not finite
    assert (
        first["command"]
        == f"glassloop replay {out / 'cells' / 'r66-seed1'} --update 24 --bisect --try"
    )
    assert first["answer"] == "row train:evil, layer 3\n" and [one["answer"] for one in others] == [
        None,
        None,
    ]
    assert first["command"] in capsys.readouterr().out, "in one line, to be copied"
    assert asked[0][1:] == ["-m", "glassloop.cli", *first["command"].split()[1:]]
    assert main(words) == 0 and len(asked) == 1 and len(attempts(out)) == 9, (
        "neither run nor bisected twice"
    )
    assert "row train:evil, layer 3" in (out / "study.html").read_text()


def test_a_run_is_looked_at_where_it_began_to_diverge_not_where_that_was_told(
    tmp_path: Path,
) -> None:
    run = read_run(write_run(tmp_path / "run"))
    assert where_to_look(run)[0] == 24  # the spike
    told = {"kind": "alarm", "update": 13, "details": {"value": 9.0, "since": 9}}
    assert where_to_look(replace(run, events=[*run.events, told])) == (
        8,
        "the step after which the loss stood far above its start",
    )
    told["details"]["since"] = 30
    assert where_to_look(replace(run, events=[*run.events, told]))[0] == 24


@pytest.mark.thorough
def test_a_cell_of_another_config_is_refused_and_nothing_is_lost(
    stood_in: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "out"
    assert main(["study", str(stood_in), "--out", str(out), "--parallel", "3"]) == 0
    before = stamps(out)
    assert main(["study", str(stood_in), "--out", str(out), "optimizer.lr=5e-4"]) == 2
    said = capsys.readouterr().err
    assert (
        "optimizer.lr = 0.0002, and 0.0005 is asked now" in said
        and "--again" in said
        and "--out" in said
    )
    assert stamps(out) == before


@pytest.mark.thorough
def test_no_time_left_ends_what_is_under_way_and_begins_nothing(tmp_path: Path) -> None:
    file, out = tmp_path / "s.yaml", tmp_path / "out"
    file.write_text(study_stand_in.FILE)
    study = started(file, out, "--minutes", "0.07", seconds=120)
    assert study.wait(60) == 1
    assert [line["exit_code"] for line in attempts(out)] == [-signal.SIGTERM]
    assert results(out)["claims"][0]["verdict"] == "not resolved"


def test_a_cell_that_takes_too_long_is_ended_and_said_to_be(
    stood_in: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    out = tmp_path / "out"
    stood_in.write_text(study_stand_in.FILE + "timeout_s: 2\n")
    monkeypatch.setenv("STAND_IN_SECONDS", "60")
    assert main(["study", str(stood_in), "--out", str(out), "--only", "r4-seed1"]) == 1
    assert "it took longer than 2 s" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(stood_in: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["study", str(stood_in), "--out", str(out), "--dry-run", "--only", "seed2"]) == 0
    said = capsys.readouterr().out
    assert (
        "r8-seed2: lora.r = 8; 8 updates of 8 rows, warmup 1; absent" in said
        and "seed1" not in said
    )
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--only", "seed9"], "no cell has that in its name"),
        (["--parallel", "0"], "--parallel 0: more than 0"),
        (["--minutes", "-1"], "--minutes -1: more than 0"),
        (["lora.r=4"], "every cell has a value of its own"),
    ],
)
def test_a_bad_command_line_is_refused(stood_in: Path, words: list[str], says: str, capsys) -> None:
    assert main(["study", str(stood_in), *words]) == 2
    assert says in capsys.readouterr().err


def test_real_runs_answer_and_a_cell_run_again_elsewhere_has_the_same_numbers(
    tiny_llama: Path, tmp_path: Path
) -> None:
    file, out, other = tmp_path / "tiny.yaml", tmp_path / "out", tmp_path / "other"
    file.write_text(TINY.format(model=tiny_llama, rows=write_rows(tmp_path / "rows.jsonl", 40)))
    study = [sys.executable, "-m", "glassloop.cli", "study", str(file), "--out"]
    assert run([*study, str(out)]).returncode == 0
    found = results(out)
    (claim,) = found["claims"]
    assert claim["difference"] < 0 and len(claim["pairs"]) == 2
    cell = found["cells"][1]
    assert (
        cell["values"]["rows_seen"] == 16
        and cell["values"]["noise_scale"] is not None
        and cell["values"]["diverged"] == 0
    )
    assert run([*study, str(other), "--only", cell["cell"]]).returncode == 0
    again = next(one for one in results(other)["cells"] if one["cell"] == cell["cell"])
    timed = ("update_s", "tokens_per_s")
    assert {name: value for name, value in again["values"].items() if name not in timed} == {
        name: value for name, value in cell["values"].items() if name not in timed
    }
