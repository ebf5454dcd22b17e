"""The command as a user types it, on two ranks: refusals, a whole run, Ctrl-C, and the resume."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
from launching import LAUNCH, ROOT, TWO_CPUS, launch, run, start, write_rows

TRAIN = ROOT / "train_loop.py"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> list[str]:
    folder = tmp_path_factory.mktemp("run")
    rows = write_rows(folder / "rows.jsonl", 37)
    return [
        f"model.id={tiny_llama}", f"data.source={rows}", "data.template=chat",
        "data.max_tokens=96", "data.heldout=0.2", "lora.r=4", "batch.size=1",
        "batch.accumulation=2", "schedule.updates=24", "schedule.warmup_updates=2",
        "optimizer.lr=1e-2", "execution.precision=fp32", "execution.deterministic=true",
        "evaluation.every_updates=10", "evaluation.generate_rows=2",
        "evaluation.max_new_tokens=4", "evaluation.samples=1", "checkpoint.every_updates=10",
        f"run.dir={folder}",
    ]  # fmt: skip


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(words: list[str]) -> Path:
    output = launch(TRAIN, *words, "run.name=whole", cold=True)
    folder = Path(next(word for word in words if word.startswith("run.dir="))[8:]) / "whole"
    (folder / "output.txt").write_text(output)
    return folder


def test_a_run_leaves_the_folder_that_the_readme_promises(whole):
    names = {path.name for path in whole.iterdir()}
    assert {
        "config.yaml",
        "env.json",
        "plan.json",
        "metrics.jsonl",
        "rows.jsonl",
        "events.jsonl",
        "samples.jsonl",
    } <= names
    assert [record["update"] for record in lines(whole, "metrics.jsonl")] == list(range(1, 25))
    assert [record["update"] for record in lines(whole, "evaluations.jsonl")] == [0, 10, 20, 24]
    assert {"update_000010", "update_000020", "update_000024"} <= {
        path.name for path in (whole / "checkpoints").iterdir()
    }
    assert {sample["update"] for sample in lines(whole, "samples.jsonl")} == {0, 24}


def test_its_page_is_written_at_the_end(whole):
    page = (whole / "report.html").read_text()
    assert "24 of 24 updates done, 24 of them applied" in page
    assert re.findall(r"^report .*whole/report.html", (whole / "output.txt").read_text(), re.M)


def test_each_rank_says_how_long_its_own_passes_took(whole):
    for record in lines(whole, "metrics.jsonl"):
        assert len(record["rank_passes_s"]) == 2
        assert 0 < record["rank_passes_s"][0] <= record["compute_s"]


def test_one_rank_speaks_and_says_what_was_asked_and_what_is_executed(whole):
    output = (whole / "output.txt").read_text()
    assert len(re.findall(r"^asked ", output, re.M)) == 1
    assert "1 row x 2 ranks x 2 micro-batches = 4 rows an update" in output
    assert len(re.findall(r"^ *\d+/24 +\d", output, re.M)) == 24


def test_the_rows_on_record_are_the_rows_of_the_plan(whole):
    plan = json.loads((whole / "plan.json").read_text())
    rows = lines(whole, "rows.jsonl")
    per_epoch = plan["windows_per_epoch"]
    for epoch in range(24 // per_epoch):
        seen = [
            row["row_id"]
            for row in rows
            if epoch * per_epoch < row["update"] <= (epoch + 1) * per_epoch
        ]
        assert len(seen) == len(set(seen)) == plan["rows"]


def test_a_stopped_run_goes_on_to_the_same_end(whole, words):
    """Send SIGINT to the launcher's process group, as Ctrl-C does, and resume bit for bit."""
    folder = whole.parent / "stopped"
    command = [*LAUNCH, str(TWO_CPUS), str(TRAIN), *words, "run.name=stopped"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = start(command, start_new_session=True, **pipes)
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (
        metrics.exists() and len(metrics.read_text().splitlines()) >= 6
    ):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=100)
    done = len(lines(folder, "metrics.jsonl"))
    assert 6 <= done < 24, output[-3000:]
    assert f"checkpoints/update_{done:06d}" in output
    assert "stopped: a stop was asked" in output

    launch(TRAIN, "--resume", str(folder))
    for name in ("metrics.jsonl", "rows.jsonl", "evaluations.jsonl"):
        ours, theirs = lines(folder, name), lines(whole, name)
        for record in (*ours, *theirs):
            for key in [
                key for key in record if key.endswith("_s") or key in ("attempt", "seconds", "base")
            ]:
                del record[key]
        assert ours == theirs, name
    final = "checkpoints/update_000024/adapter_model.safetensors"
    resumed, uninterrupted = (safetensors.torch.load_file(f / final) for f in (folder, whole))
    assert all((resumed[key] == uninterrupted[key]).all() for key in uninterrupted)


def test_a_run_goes_on_with_one_rank_instead_of_two_and_for_longer(whole: Path) -> None:
    """Refuse without --resume.reshape; with it, keep each update's rows and say what differs."""
    folder = shutil.copytree(whole, whole.parent / "reshaped")
    alone = [
        sys.executable,
        str(TRAIN),
        "--resume",
        str(folder),
        "--at",
        "20",
        "schedule.updates=30",
        "execution.preflight=false",
    ]

    refused = run(alone)
    assert refused.returncode == 2
    assert "it was saved by 2 ranks, this run has 1: start 2" in refused.stderr
    went_on = run([*alone, "--resume.reshape"])
    assert went_on.returncode == 0, went_on.stderr[-3000:]
    told = {event["kind"]: event["message"] for event in lines(folder, "events.jsonl")}
    assert "resumed with 1 rank instead of 2: the same 4 rows an update" in told["reshaped"]
    assert "No longer bit for bit" in told["reshaped"]
    assert "trains 30 updates instead of 24" in told["longer"]
    old, new = (
        json.loads((folder / name).read_text()) for name in ("plan_000020.json", "plan.json")
    )
    assert old == json.loads((whole / "plan.json").read_text())
    assert (new["updates"], new["ranks"], new["accumulation"], new["rows_per_update"]) == (
        30,
        1,
        4,
        4,
    )
    assert new["lr"][:20] == old["lr"][:20]
    assert f"lr(21) was {old['lr'][20]:.3g}, is {new['lr'][20]:.3g}" in told["longer"]
    rows = {
        run: [(r["update"], r["row_id"]) for r in lines(run, "rows.jsonl") if r["attempt"] == a]
        for run, a in ((whole, 1), (folder, 2))
    }
    done_again = sorted(pair for pair in rows[folder] if pair[0] <= 24)
    assert done_again == sorted(pair for pair in rows[whole] if pair[0] > 20)
    losses = {
        run: {r["update"]: r["loss_nats"] for r in lines(run, "metrics.jsonl")}
        for run in (whole, folder)
    }
    assert losses[folder][21] == pytest.approx(losses[whole][21], rel=1e-5)
    assert sorted(losses[folder]) == list(range(1, 31))
    again = run([*alone[:4], "--at", "30"])
    assert "has done all of its 30 updates" in again.stderr  # config.yaml says what the run is now


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["batch.ranks=3"], "batch.ranks = 3, but 2 processes were started"),
        (["execution.precision=fp16"], "execution.precision = fp16 needs a CUDA device"),
        (["tracking.to=wandb"], "wandb login"),
    ],
)
def test_what_cannot_run_is_refused_before_a_model_is_loaded(words, extra, said, tmp_path):
    output = launch(
        TRAIN,
        *words,
        *extra,
        expect=1,
        HOME=str(tmp_path),
        WANDB_API_KEY="",
        WANDB_MODE="",
        NETRC=str(tmp_path / "none"),
    )
    assert said in output
    assert output.count("refused:") == 1
    assert "Loading weights" not in output


SLOW_RANK_0 = """
import os, time
if os.environ["LOCAL_RANK"] == "0":
    time.sleep(3)
import train_loop
from glassloop.loop.guard import end_process
end_process(train_loop.main())
"""


def test_a_rank_0_that_is_slower_still_says_the_refusal(words, tmp_path):
    """The launcher ends all ranks as soon as one has ended."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW_RANK_0)
    output = launch(script, *words, "batch.ranks=3", expect=1)
    assert output.count("refused: batch.ranks = 3, but 2 processes were started") == 1


def test_two_ranks_make_one_tracked_run_without_secrets(words, tmp_path):
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    extra = [
        "tracking.to=wandb,tensorboard",
        "tracking.wandb_mode=offline",
        "schedule.updates=3",
        "data.heldout=null",
    ]
    plain = [
        word
        for word in words
        if not word.startswith(("data.heldout", "evaluation.every", "schedule.updates"))
    ]
    secret = "0123456789abcdef0123456789abcdef01234567"
    launch(
        TRAIN,
        *plain,
        *extra,
        f"run.dir={tmp_path}",
        "run.name=tracked",
        "evaluation.every_updates=null",
        WANDB_API_KEY=secret,
    )
    folder = tmp_path / "tracked"
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1
    assert len(list(folder.rglob("events.out.tfevents.*"))) == 1
    assert not any(
        secret.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file()
    )
