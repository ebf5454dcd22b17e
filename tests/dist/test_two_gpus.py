"""benchmarks/two_gpus.sh as a user starts it, on two CPU ranks, and what its verdicts rest on."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT, environment, run

TINY = ["--device", "cpu", "--model", "random:tiny", "--updates", "5", "--first", "3"]


@pytest.fixture(scope="module")
def two() -> Any:
    """The script's modules by name."""
    names = [f"two_gpus{of}" for of in ("", "_killed", "_parts", "_runs", "_speed")]
    names.append("suite")
    return type("Modules", (), {name: importlib.import_module(name) for name in names})


def place_in(two: Any, folder: Path) -> Any:
    return two.two_gpus_runs.Place("cpu", "random:tiny", folder, ())


def record(update: int, **changed: Any) -> dict[str, Any]:
    plain = {
        "update": update,
        "rows": 4,
        "supervised_tokens": 50,
        "lr": 1e-4,
        "loss_nats": 2.0,
        "grad_norm_pre_clip": 0.5,
        "attempt": 1,
    }
    return plain | changed


def write(
    folder: Path, records: list[dict[str, Any]], rows: dict[int, list[str]] | None = None
) -> Path:
    """A run's folder as far as comparisons read it."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    seen = rows or {one["update"]: [f"row:{one['update']}"] for one in records}
    lines = [{"update": update, "row_id": row} for update, ids in seen.items() for row in ids]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.thorough
def test_two_ranks_one_rank_a_kill_and_a_resume_in_one_command(tmp_path: Path) -> None:
    out = tmp_path / "two.json"
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "two_gpus.py"),
        *TINY,
        "--parts",
        "peft,one_rank,killed,fused,trl,unsloth",
        "--minutes",
        "5",
    ]
    command += ["--out", str(out), "--work", str(tmp_path / "work"), "--workloads", "scam-v1"]
    # The peers' interpreter is none: their part fails, and the others do not care.
    command += ["--python", "trl=/nowhere/python", "--python", "unsloth=/nowhere/python"]
    done = run(command, timeout_s=290)
    assert done.returncode == 1, done.stdout + done.stderr
    told = json.loads(out.read_text())
    verdicts = {title: one["verdict"] for title, one in told["parts"].items()}
    assert verdicts == {
        "the recipe, peft": "held", "replicas agree": "held", "one rank, same losses": "held",
        "one rank killed": "held", "exact resume": "held", "engine fused, first update": "held",
        "engine fused, one rank": "held",
        "trl under DDP": "failed", "unsloth under DDP": "failed",
    }, done.stdout  # fmt: skip
    parts = {title: one["numbers"] for title, one in told["parts"].items()}
    assert (
        parts["the recipe, peft"]["updates"] == 5
        and 0 < parts["the recipe, peft"]["reduce_share"] < 1
    )
    one = parts["one rank, same losses"]
    assert (
        one["updates_compared"] == 3
        and one["loss_off_worst"] < 1e-5
        and one["other_rows_in_updates"] == []
    )
    two, alone = parts["engine fused, first update"], parts["engine fused, one rank"]
    assert (two["beside"], two["updates_compared"], two["ranks"]) == ("peft", 1, 2)
    assert (alone["beside"], alone["updates_compared"], alone["ranks"]) == (
        "fused",
        3,
        1,
    ) and alone["loss_off_worst"] < 1e-5
    killed = parts["one rank killed"]
    assert (
        killed["exit_code"] not in (0, None)
        and killed["rank_ended_s"] < 15
        and killed["checkpoint_after"][0] == "update_000004"
    )
    assert (
        parts["exact resume"]["done_again"] == list(range(5, 13))
        and parts["exact resume"]["differing"] == []
    )
    machine = told["machine"]
    assert (
        machine["nccl_environment"] == {"NCCL_NVLS_ENABLE": "0"}
        and machine["all_reduce_4_mib"]["outcome"] == "ok"
    )
    assert "send back" in done.stdout and done.stdout.count("held      exact resume") == 2
    # The rows are as long as the workload's: what the run counted is what was made.
    lengths = told["rows"]["tokens"]
    updates = [
        json.loads(line)
        for line in (tmp_path / "work/runs/peft/metrics.jsonl").read_text().splitlines()
    ]
    assert 231 * 16 <= sum(updates[0]["rank_real_tokens"]) <= 647 * 16 and 400 < lengths / 600 < 470


def test_the_script_starts_it_from_anywhere_with_multicast_off(tmp_path: Path) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/bin/sh\necho "$PWD|$NCCL_NVLS_ENABLE|$PYTHONPATH|$*"\nexit 3\n')
    stand_in.chmod(0o755)
    command = ["bash", str(ROOT / "benchmarks" / "two_gpus.sh"), "--parts", "peft"]
    env = environment(PYTHON=str(stand_in), PYTHONPATH="/mine")
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    words = "benchmarks/two_gpus.py --parts peft"
    assert done.returncode == 3
    assert done.stdout == f"{ROOT}|0|{ROOT}:/mine|{words}\n"


def test_it_refuses_what_it_cannot_do(
    two: Any, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    assert two.two_gpus.main(["--parts", "peft,other"]) == 2
    assert "--parts other: there are peft, one_rank" in capsys.readouterr().err
    assert two.two_gpus.main(["--model", "someone/model"]) == 2
    (tmp_path / "runs").mkdir()
    assert two.two_gpus.main([*TINY, "--work", str(tmp_path)]) == 2
    assert "it holds runs already" in capsys.readouterr().err


def test_rows_are_as_long_as_the_workloads_under_the_tokenizer_of_random_models(
    two: Any, tmp_path: Path
) -> None:
    from glassloop.base.random import CHAT_TEMPLATE, _tokenizer

    lengths = two.two_gpus_runs.write_rows(tmp_path / "rows.jsonl", "scam-v1", 5)
    tokenizer = _tokenizer(512)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    for line, length in zip(
        (tmp_path / "rows.jsonl").read_text().splitlines(), lengths, strict=True
    ):
        row = json.loads(line)
        turns = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == length


def test_a_part_that_raises_or_comes_too_late_is_its_own_failure(
    two: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, Verdict = two.two_gpus, two.suite.Verdict

    def breaks(*_: Any) -> Any:
        raise KeyError("loss_nats")

    def waits(*_: Any) -> Any:
        time.sleep(1.5)
        return {"waits": Verdict("held", "", {})}

    monkeypatch.setattr(script, "PARTS", {"breaks": breaks, "waits": waits, "late": waits})
    monkeypatch.setattr(script, "STAGES", ((60.0, ("breaks", "waits")), (60.0, ("late",))))
    kept: list[int] = []
    asked, last = two.two_gpus_parts.Asked(), time.monotonic() + 2.4
    found = script.run_stages(
        place_in(two, tmp_path),
        asked,
        ["breaks", "waits", "late"],
        last,
        lambda found: kept.append(len(found)),
    )
    assert {name: one["verdict"] for name, one in found.items()} == {
        "breaks": "failed",
        "waits": "held",
        "late": "failed",
    }
    assert (
        "KeyError" in found["breaks"]["why"]
        and "no time was left" in found["late"]["why"]
        and kept == [1, 2, 3]
    )


@pytest.mark.parametrize(
    ("changed", "rows", "verdict"),
    [
        ({}, None, "held"),
        ({"loss_nats": 2.0 * 1.0021}, None, "missed"),
        ({"grad_norm_pre_clip": 0.53}, None, "missed"),
        ({"supervised_tokens": 51}, None, "missed"),
        ({"lr": 2e-4}, None, "missed"),
        ({}, {1: ["row:1"], 2: ["row:7"]}, "missed"),
        ({"loss_nats": "nan"}, None, "missed"),
    ],
)  # fmt: skip
def test_another_way_is_held_to_the_same_rows_and_losses(
    two, tmp_path, monkeypatch, changed, rows, verdict
) -> None:
    timed = {
        "update_s": 1.0,
        "compute_s": 0.9,
        "rank_passes_s": [0.8],
        "reduce_s": 0.05,
        "rank_real_tokens": [60],
        "rank_peak_gib": None,
    }
    write(tmp_path / "runs" / "peft", [record(update, **timed) for update in (1, 2, 3)])
    write(tmp_path / "runs" / "ddp", [record(1, **timed), record(2, **timed | changed)], rows)

    class Ended:
        process, said = subprocess.Popen(["true"]), ""

        def reaches(self, *_: Any) -> bool:
            return True

    monkeypatch.setattr(two.two_gpus_runs, "train", lambda *_, **__: Ended())
    monkeypatch.setattr(two.two_gpus_runs, "end", lambda *_: None)
    found = two.two_gpus_parts.ddp(
        place_in(two, tmp_path), two.two_gpus_parts.Asked(updates=3, first=2), time.monotonic() + 5
    )
    assert [one.verdict for one in found.values()] == [verdict]


def test_a_resume_is_exact_or_it_is_missed(two: Any, tmp_path: Path) -> None:
    same = two.two_gpus_killed.same_again
    whole = write(tmp_path / "whole", [record(update) for update in (1, 2, 3)])
    again = write(
        tmp_path / "again", [record(1), record(2), record(2, attempt=2), record(3, attempt=2)]
    )
    assert same(again, whole, 0, None).verdict == "held"
    other = write(
        tmp_path / "other",
        [record(1), record(2, attempt=2), record(3, attempt=2, loss_nats=2.0 + 1e-15)],
    )
    assert same(other, whole, 0, None).numbers["differing"] == [3]
    short = write(tmp_path / "short", [record(1), record(2, attempt=2)])
    assert same(short, whole, 0, None).numbers["differing"] == [3]


def test_a_checkpoint_that_was_touched_is_seen(two: Any, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "update_000004"
    folder.mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"12")
    before = two.two_gpus_runs.checkpoint(tmp_path)
    assert (
        before is not None
        and before[0] == "update_000004"
        and two.two_gpus_runs.checkpoint(tmp_path) == before
    )
    (folder / "a.bin").write_bytes(b"13")
    assert two.two_gpus_runs.checkpoint(tmp_path) != before


def test_scaling_has_marks_on_cards_and_says_what_is_too_good(two: Any, tmp_path: Path) -> None:
    def line(ranks: int, rate: float, within: bool = True) -> dict[str, Any]:
        cell = {"engine": "peft", "workload": "full-v1", "ranks": ranks}
        machine = {"gpus": [], "git": None, "packages": {}}
        return {
            "cell": cell,
            "rows_digest": "x",
            "tokens_per_s": {"real": rate},
            "check": {"within": within},
            "check_only": False,
            "machine": machine,
        }

    cards = two.two_gpus_runs.Place("cuda", "random:llama-8b", tmp_path, ("0", "1"))
    scaling = two.two_gpus_speed._scaling
    rates = {"held": 191.0, "missed": 189.0}
    assert {
        name: scaling(cards, [line(1, 100.0), line(2, rate)], "peft", "full-v1").verdict
        for name, rate in rates.items()
    } == {
        "held": "held",
        "missed": "missed",
    }
    slightly, far = (
        scaling(cards, [line(1, 100.0), line(2, rate)], "peft", "full-v1")
        for rate in (202.0, 220.0)
    )
    assert "above 100 %" in slightly.why and (slightly.verdict, far.verdict) == ("held", "failed")
    assert scaling(cards, [line(1, 100.0)], "peft", "full-v1").verdict == "failed"
    assert (
        scaling(cards, [line(1, 100.0), line(2, 200.0, within=False)], "peft", "full-v1").verdict
        == "missed"
    )


def test_what_a_command_has_started_ends_with_it(two: Any, tmp_path: Path) -> None:
    runs = two.two_gpus_runs
    # SIGTERM ends the outer process. The inner one has a session of its own, as ranks have.
    sleeps = "[sys.executable, '-c', 'import time; time.sleep(600)']"
    inner = f"subprocess.Popen({sleeps}, start_new_session=True)"
    code = f"import subprocess, sys, time; print({inner}.pid, flush=True); time.sleep(600)"
    one = runs.start(place_in(two, tmp_path), [sys.executable, "-c", code], "launcher", 1)
    assert one.reaches(lambda: bool(one.said), time.monotonic() + 20)
    child = int(one.said)
    known = runs.tree(one.process.pid)
    assert set(known) == {one.process.pid, child}
    runs.end(one)
    assert one.process.poll() is not None and one not in runs.RUNNING
    stat, until = Path(f"/proc/{child}/stat"), time.monotonic() + 10
    while (
        time.monotonic() < until
        and stat.exists()
        and stat.read_text().rpartition(")")[2].split()[0] != "Z"
    ):
        time.sleep(0.05)
    lives = (
        runs.tree(child).get(child) == known[child]
        and stat.read_text().rpartition(")")[2].split()[0] != "Z"
    )
    runs.kill({child: known[child]})
    assert not lives
