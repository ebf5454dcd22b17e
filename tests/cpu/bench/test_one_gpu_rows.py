"""Verdicts of one_gpu.sh on long rows, tests and families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import one_gpu
import one_gpu_rows
import pytest
from long_rows_unsloth import more_updates
from one_gpu_commands import Ended, Here
from suite import Verdict
from two_gpus_runs import ROOT, Place


def place(folder: Path) -> Here:
    return Here(Place("cuda", "", folder, ("0",)), "", ("data.source=x",), real_rows=False)


def lines(path: Path, *found: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in found))


def test_a_long_row_is_judged_by_its_length_and_the_hosts_memory(tmp_path: Path) -> None:
    def case(tokens: int, trained: bool = True, host: float = 60.0) -> dict[str, Any]:
        found = {"kind": "case", "tokens": tokens, "trained": trained, "host_gib": host}
        return found | ({"tokens_per_s": 100.0} if trained else {"error": "out of memory"})

    def verdict(*cases: dict[str, Any]) -> str:
        lines(tmp_path / "long_24.jsonl", *cases)
        return one_gpu_rows.judge_long(place(tmp_path), {}, card=24).verdict

    assert verdict(case(210_000, trained=False), case(201_600)) == "held"
    assert verdict(case(199_999)) == "missed" and verdict(case(201_600, host=65.0)) == "missed"
    assert verdict(case(210_000, trained=False)) == verdict() == "failed"


def test_rows_beyond_the_host_are_extrapolated_by_a_ledger_that_was_right(tmp_path: Path) -> None:
    def verdict(peak: float, budget: float = 77.8) -> Verdict:
        case = {"kind": "case", "tokens": 262_144, "trained": True, "tokens_per_s": 1600.0}
        case |= {"host_gib": 64.0, "predicted_gib": 25.0, "peak_gib": peak, "budget_gib": budget}
        lines(tmp_path / "long_80.jsonl", case)
        return one_gpu_rows.judge_long(place(tmp_path), {}, card=80)

    right, larger, wrong, small = verdict(24.5), verdict(25.7), verdict(25.8), verdict(24.5, 50.0)
    assert (right.verdict, larger.verdict) == ("held", "held")
    assert "extrapolated, not run" in right.why
    assert larger.numbers["by_ledger_tokens"] < right.numbers["by_ledger_tokens"]
    assert right.numbers["by_ledger_host_gib"] > 150
    assert (wrong.verdict, small.verdict) == ("missed", "missed")


def test_long_rows_are_set_beside_unsloth_s_of_the_same_run(tmp_path: Path) -> None:
    def verdict(slower: float = 1.0, **theirs: Any) -> Verdict:
        ours = {"kind": "case", "engine": "fused", "trained": True}
        other = {"kind": "case", "engine": "unsloth", "trained": True} | theirs
        cases = [
            line
            for tokens, rate in ((16384, 8000.0), (65536, 4000.0))
            for line in (
                ours | {"tokens": tokens, "tokens_per_s": rate * 1.25 * slower},
                other | {"tokens": tokens, "tokens_per_s": rate},
            )
        ]
        lines(tmp_path / "long_speed.jsonl", *cases)
        return one_gpu_rows.judge_long_speed(place(tmp_path), {})

    assert verdict().verdict == "held" and "1.25, 1.25 times Unsloth's" in verdict().why
    assert verdict(0.99).verdict == "missed"
    absent = verdict(0.5, trained=False, absent="the package unsloth is not installed")
    assert absent.verdict == "held" and "no mark without Unsloth: the package" in absent.why


def test_unsloth_does_each_length_twice_since_the_first_compiles() -> None:
    assert more_updates([30.0], 5.0) and not more_updates([30.0, 2.0], 5.0)
    assert more_updates([0.5, 0.5], 5.0) and not more_updates([0.5] * 4, 5.0)


def test_tests_hold_if_some_ran_and_none_failed() -> None:
    def verdict(code: int, said: str) -> str:
        return one_gpu_rows.judge_gpu_test(
            place(Path("/")), {"a": Ended(code, 1.0, None, said)}
        ).verdict

    assert verdict(0, "== 3 passed, 1 skipped in 2 s ==") == "held"
    assert verdict(0, "2 skipped in 1 s") == "left out"
    assert verdict(1, "1 failed, 2 passed") == "missed"
    assert verdict(-11, "Segmentation fault") == "missed"
    assert verdict(5, "no tests ran in 0.1s") == "failed"


def test_one_name_stands_for_several_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert one_gpu.main(["--dry-run", "--parts", "long,gpu_tests"]) == 0
    said = capsys.readouterr().out
    assert said.count("long_rows.py") == 5
    files = [path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py")]
    assert files and all(
        f"-m pytest -q -p no:cacheprovider tests/gpu/{name}" in said for name in files
    )


def test_every_model_is_measured_and_agrees(tmp_path: Path) -> None:
    measured = {"kind": "measured", "model": "a", "rows": "full", "kernel": "chosen"}
    proof = {"kind": "proof", "model": "a", "differs": ""}

    def verdict(*found: dict[str, Any]) -> str:
        lines(tmp_path / "families.jsonl", *found)
        return one_gpu_rows.judge_families(place(tmp_path), {}).verdict

    measured |= {"norm": 0.5}
    assert verdict(measured | {"tokens_a_s": 5.0, "norm": 0.0}, proof) == "missed"
    assert verdict(measured | {"tokens_a_s": 5.0}, proof) == "held"
    assert verdict(measured | {"tokens_a_s": 5.0}, proof | {"differs": "loss"}) == "missed"
    assert verdict({"kind": "failed", "model": "a", "error": "e"}) == "failed"
