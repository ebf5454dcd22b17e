"""`glassloop evaluate`: the run's own losses, other rows, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from schemas import conform
from trained_runs import copy_of, signed_anew, write_calls
from transformers import AutoModelForCausalLM

from glassloop.base.reading import prepare_4bit
from glassloop.cli.__main__ import main
from glassloop.loop.evaluation import Answer
from glassloop.stats import mcnemar, wilson
from glassloop.use.heldout import rows_of
from glassloop.use.measuring import Measured, report_of
from glassloop.use.trained import load_tokenizer_of, open_trained, template_of


def answered(label: str, verdict: str | None) -> Answer:
    return Answer("r", "", "", "", label, verdict, False, False, True, 3)


def test_scores_and_differences_are_those_of_the_rows():
    labels = ["scam"] * 6 + ["honest"] * 4
    base = ["scam", "honest", "honest", None, "scam", "honest"] + ["honest"] * 4
    adapter = ["scam"] * 5 + ["honest"] + ["scam"] + ["honest"] * 3
    answers = {
        side: [answered(label, verdict) for label, verdict in zip(labels, said, strict=True)]
        for side, said in (("base", base), ("adapter", adapter))
    }
    report = report_of(
        Measured(
            (10,) * 10, {"base": [20.0] * 10, "adapter": [10.0 + i for i in range(10)]}, answers
        )
    )
    by_name = {score.name: score for score in report.scores}
    assert by_name["loss_nats"].values == {"base": 2.0, "adapter": 1.45}
    assert by_name["accuracy"].values == {"base": 0.6, "adapter": 0.8}
    assert by_name["accuracy"].p == mcnemar(1, 3)
    assert by_name["precision"].values == {"base": 1.0, "adapter": pytest.approx(5 / 6)}
    assert by_name["recall"].values == {
        "base": pytest.approx(2 / 6),
        "adapter": pytest.approx(5 / 6),
    }
    assert by_name["f1"].values == {"base": pytest.approx(0.5), "adapter": pytest.approx(10 / 12)}
    assert by_name["recall"].intervals["adapter"] == wilson(5, 6)


def found(capsys, *words) -> dict:
    capsys.readouterr()
    code = main(["evaluate", *map(str, words), "--json"])
    out = capsys.readouterr()
    assert code == 0, out.out + out.err
    return conform("evaluate", json.loads(out.out))


def plain_loss(run: Path) -> float:
    """Loss of the quantised base in plain transformers, row by row."""
    trained = open_trained(run)
    tokenizer = load_tokenizer_of(trained)
    rows = rows_of(trained, template_of(trained, tokenizer)).rows
    (copy,) = (Path(trained.config.model.cache_dir or "") / "quantized").glob("tiny-llama*")
    model = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32)
    prepare_4bit(model, torch.float32)
    total = 0.0
    for row in rows:
        labels = torch.tensor(
            [[t if s else -100 for t, s in zip(row.input_ids, row.supervised, strict=True)]]
        )
        with torch.no_grad():
            total += (
                float(model(torch.tensor([row.input_ids]), labels=labels).loss)
                * row.supervised_tokens
            )
    return total / sum(row.supervised_tokens for row in rows)


def test_losses_are_those_that_the_run_recorded(run, tmp_path, capsys):
    run = copy_of(run, tmp_path / "copy")
    shutil.rmtree(run / "evaluated", ignore_errors=True)
    told = found(capsys, run)
    last = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])
    assert told["rows"] == last["rows"] == 6
    assert told["counts"]["adapter"]["loss_nats"] == pytest.approx(last["loss_nats"], abs=1e-6)
    assert told["counts"]["base"]["loss_nats"] == pytest.approx(plain_loss(run), abs=1e-4)
    (saved,) = (run / "evaluated").glob("*.json")
    assert json.loads(saved.read_text())["scores"][0]["name"] == "loss_nats"
    assert "Quatermain" not in saved.read_text()


def test_rows_of_ones_own_and_what_training_has_seen(run, tmp_path, capsys):
    assert (
        found(capsys, run, "--data", write_calls(tmp_path / "mine.jsonl", 6), "--answers", 0)[
            "rows"
        ]
        == 6
    )
    code = main(["evaluate", str(run), "--data", str(tmp_path / "mine.jsonl"), "--answers", "0"])
    out = capsys.readouterr().out
    assert code == 0 and "what a training row asked" in out and "adapter - base" in out


def test_rows_with_other_column_names(run, tmp_path, capsys):
    mine = write_calls(tmp_path / "mine.jsonl", 6)
    wanted = found(capsys, run, "--data", mine, "--answers", 0)
    renamed = mine.read_text().replace('"dialogue"', '"text"').replace('"label"', '"is_scam"')
    (tmp_path / "other.jsonl").write_text(renamed)
    told = found(
        capsys,
        run,
        "--data",
        tmp_path / "other.jsonl",
        "--columns",
        "dialogue=text, label=is_scam",
        "--answers",
        0,
    )
    assert told["scores"] == wanted["scores"]


def test_what_cannot_be_used_is_refused(run, tmp_path, capsys):
    gone = copy_of(run, tmp_path / "gone")
    for path in gone.glob("checkpoints/*/tokenizer.json"):
        path.write_text("{")
    foreign = tmp_path / "foreign.csv"
    foreign.write_text("text,verdict\ncaller: hi,1\n")
    diverged = copy_of(run, tmp_path / "diverged")
    adapter = diverged / "checkpoints" / "update_000002" / "adapter_model.safetensors"
    save_file({name: tensor * float("nan") for name, tensor in load_file(adapter).items()}, adapter)
    signed_anew(adapter.parent)
    for words, message in (
        ([tmp_path / "none"], "no folder"),
        ([gone], "no whole checkpoint"),
        ([run, "--data", tmp_path / "none.jsonl"], "no such file"),
        ([run, "--rows", 0], "--rows 0"),
        (
            [run, "--data", foreign, "--columns", "dialogue:text"],
            "'dialogue:text' is not ROLE=NAME",
        ),
        (
            [run, "--data", foreign, "--columns", "call=text"],
            "question, input, reasoning, response, system, history, messages, tools",
        ),
        ([run, "--columns", "dialogue=text"], "give --data too"),
        ([run, "--answers", -1], "--answers -1"),
        ([run, "--data", foreign], "--columns ROLE=NAME"),
        (
            [diverged / "checkpoints" / "update_000002"],
            "the adapter's loss is nan on row 0 (6 such of 6 rows)",
        ),
    ):
        assert main(["evaluate", *map(str, words)]) == 2
        assert message in capsys.readouterr().err


def test_a_disk_that_refuses_the_result_takes_nothing_away(run, tmp_path, capsys):
    copy = copy_of(run, tmp_path / "copy")
    shutil.rmtree(copy / "evaluated", ignore_errors=True)
    (copy / "evaluated").write_text("in the way")
    assert main(["evaluate", str(copy), "--answers", "0"]) == 0
    out = capsys.readouterr().out
    assert "loss, nats a token" in out and "nowhere" in out and str(copy / "evaluated") in out
    assert main(["evaluate", str(copy), "--answers", "0", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["rows"] == 6 and "nowhere" in told.err


def test_the_precision_on_record_is_the_one_computed_in(run, tmp_path, capsys):
    copy = copy_of(run, tmp_path / "copy")
    state = copy / "checkpoints" / "update_000002" / "state.json"
    fields = json.loads(state.read_text())
    fields["config"]["execution"]["precision"] = "fp16"  # which a CPU has not
    state.write_text(json.dumps(fields))
    signed_anew(state.parent)
    assert found(capsys, copy, "--answers", 0)["precision"] == "fp32"


def test_a_refusal_is_said_once_a_host(run, capsys, monkeypatch):
    """A rank that its launcher does not end meanwhile was alone with it, and says it."""
    slept = []
    monkeypatch.setattr("glassloop.loop.guard.time.sleep", slept.append)
    for rank, waits in (("0", []), ("1", [20.0])):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert main(["evaluate", str(run / "nothing")]) == 2
        assert slept == waits
        assert capsys.readouterr().err.count("refused") == 1
