"""The benchmark on one and two ranks, checked against the reference, and with a peer beside it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import launching
import pytest

TINY = [
    "--device",
    "cpu",
    "--model",
    "random:tiny",
    "--workloads",
    "scam-v1",
    "--rows-per-update",
    "4",
    "--updates",
    "1",
    "--warmup",
    "1",
]


def run(*words: str, expect: int = 0) -> str:
    done = launching.run([sys.executable, *words], timeout_s=400)
    assert done.returncode == expect, (
        f"exit code {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}"
    )
    return done.stdout


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_one_and_two_ranks_in_both_layouts_do_the_same_update(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    command = [
        "-m",
        "glassloop.cli",
        "bench",
        *TINY,
        "--precision",
        "fp32",
        "--layouts",
        "literal,packed",
        "--ranks",
        "1,2",
    ]
    shown = run(*command, "--repeats", "1", "--out", str(out))
    assert (
        shown.count("peft     scam-v1") == 4
        and shown.count("a check of results, not of speed") == 2
    )
    lines = lines_of(out)
    assert [line["cell"]["ranks"] for line in lines] == [1, 2, 1, 2]
    for line in lines:
        assert line["check"]["within"], line
        assert len({one["rows_digest"] for one in lines}) == 1
        assert len(line["passes"]) == line["cell"]["ranks"]
        rates, each = line["tokens_per_s"], line["tokens_per_s_per_rank"]
        assert rates["supervised"] < rates["real"] <= rates["slot"]
        assert each["real"] == pytest.approx(rates["real"] / line["cell"]["ranks"])
        assert (rates["slot"] == rates["real"]) == (line["cell"]["layout"] == "packed")
        assert line["first_update_s"]["from_launch"] > line["first_update_s"]["from_built"] > 0
        assert (
            line["peak"]["host_gib"] > 0
            and line["peak"]["allocated_gib"] is None
            and line["energy"] is None
        )
        parts = line["shares"]
        assert parts["passes"] + parts["reduce"] + parts["optimizer"] + parts[
            "rest"
        ] == pytest.approx(1)
        assert 0 < parts["data"] < parts["passes"]
    assert {line["check"].get("norm_off", 0) < 1e-5 for line in lines} == {True}


def test_a_peer_is_measured_on_the_same_rows_and_adapters(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    shown = run(
        "benchmarks/peers.py", *TINY, "--peers", "trl,unsloth-trainer", "--out", str(out), expect=1
    )
    reference, trl, unsloth = lines_of(out)
    assert reference["check_only"] and trl["rows_digest"] == reference["rows_digest"]
    assert (
        trl["check"]["within"]
        and trl["check"]["loss_off"] < 1e-4
        and trl["check"]["norm_off"] < 1e-2
    )
    assert (
        "unsloth" in unsloth["failed"] and unsloth["check"]["within"] is None
    )  # not installed here: said, and no number shown
    assert shown.count("scam-v1    literal") == 1


@pytest.mark.thorough
def test_side_by_side_a_peer_and_our_arm_take_turns_on_the_same_rows(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    words = [
        "--peers",
        "trl",
        "--ours",
        "peft",
        "--ours",
        "peft,packed",
        "--turns",
        "2",
        "--out",
        str(out),
    ]
    shown = run("benchmarks/peers.py", *TINY, *words)
    literal, packed, trl = lines_of(out)
    assert [line["cell"]["engine"] for line in (literal, packed, trl)] == ["peft", "peft", "trl"]
    for line in (literal, packed, trl):
        assert (
            line["check"]["within"]
            and len(line["turns"]) == 2
            and line["first_update_s"]["from_launch"] is None
        )
        assert [turn["real_tokens"] for turn in line["turns"]] == [
            turn["real_tokens"] for turn in trl["turns"]
        ]
        assert (len(line["losses_nats"]), len(line["warmup_s"]), line["updates"]) == (4, 2, 2)
        assert line["losses_nats"] == pytest.approx(
            trl["losses_nats"], rel=2e-3
        )  # nobody's updates were disturbed by another's turns
    assert (
        "peft, scam-v1, packed, 2 rows, 1 rank, recomputed / trl: " in shown
        and "2 turns); 4 updates in" in shown
    )


@pytest.mark.thorough
def test_a_matrix_in_turns_has_its_reference_among_the_arms(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    command = [
        "-m",
        "glassloop.cli",
        "bench",
        *TINY,
        "--precision",
        "fp32",
        "--layouts",
        "packed",
        "--ranks",
        "1,2",
        "--turns",
        "2",
    ]
    shown = run(*command, "--out", str(out))
    reference, one, two = lines_of(out)
    assert (
        reference["check_only"]
        and len(reference["turns"]) == 1
        and [len(line["turns"]) for line in (one, two)] == [2, 2]
    )
    assert (
        one["check"]["norm_off"] < 1e-5
        and two["check"]["norm_off"] < 1e-5
        and two["cell"]["ranks"] == 2
    )
    assert shown.count("peft     scam-v1") == 2


def test_the_users_own_rows_are_measured_and_an_absent_engine_is_told(tmp_path: Path) -> None:
    source = tmp_path / "mine.jsonl"
    source.write_text(
        "".join(
            f'{{"prompt": "question {i}", "completion": "{"answer " * (i % 5 + 1)}"}}\n'
            for i in range(9)
        )
    )
    out = tmp_path / "results.jsonl"
    words = [word if word != "scam-v1" else "own" for word in TINY]
    fields = [f"data.source={source}", "data.template=instruct"]
    engines = [
        "--engines",
        "peft,unsloth",
        "--layouts",
        "literal",
        "--repeats",
        "1",
        "--precision",
        "bf16",
    ]
    shown = run("-m", "glassloop.cli", "bench", *words, *engines, "--out", str(out), *fields)
    reference, absent = lines_of(out)
    assert reference["check"]["within"] and reference["cell"]["workload"] == "own"
    assert (
        absent["left_out"]
        and "left out: unsloth, own, literal" in shown
        and "not installed" in shown
    )


def test_a_profile_is_of_one_update_and_measures_nothing(tmp_path: Path) -> None:
    out, profiles = tmp_path / "results.jsonl", tmp_path / "profiles"
    words = [
        "--layouts",
        "literal",
        "--ranks",
        "2",
        "--profile",
        "2",
        "--profile-dir",
        str(profiles),
        "--out",
        str(out),
    ]
    shown = run("-m", "glassloop.cli", "bench", *TINY, *words)
    (folder,) = profiles.iterdir()
    assert folder.name == "peft-scam-v1-literal-2-rows-2-ranks-recomputed-update-2"
    page = (folder / "summary.md").read_text()
    assert (
        page in shown
        and "Update 2: peft, scam-v1" in page
        and "aten::mm" in page
        and "Memory allocated on the CPU" in page
    )
    assert (folder / "trace.json.gz").stat().st_size > 10_000 and not out.exists()
