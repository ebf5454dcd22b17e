"""Groups of two_gpus.sh, its file of results, and its parts about runs and hosts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import suite
import two_gpus
import two_gpus_more
from launching import ROOT, run

TINY = ["--device", "cpu", "--model", "random:tiny", "--updates", "5", "--first", "3"]


def test_groups_hold_each_part_once_and_beside_what_it_is_compared_with() -> None:
    groups = two_gpus.GROUPS
    assert sorted(part for parts in groups.values() for part in parts) == sorted(two_gpus.PARTS)
    assert {"peft", "one_rank", "ddp", "fused"} <= set(groups["A"])
    stages = [part for _, parts in two_gpus.STAGES for part in parts]
    assert stages == list(two_gpus.PARTS)


def test_results_of_other_parts_are_kept_and_a_strange_file_is_refused(tmp_path: Path) -> None:
    script, out, here = suite, tmp_path / "two.json", {"gpus": [{"name": "NVIDIA H200"}]}
    assert script.earlier(out, here, ["ddp"]) == {}
    parts = {name: {"part": name, "verdict": "held", "commit": "a"} for name in ("ddp", "fused")}
    out.write_text(json.dumps({"machine": here, "parts": parts}))
    assert script.earlier(out, here, ["ddp"]) == {"fused": parts["fused"]}
    with pytest.raises(ValueError, match=r"--add: .*two\.json is of other cards"):
        script.earlier(out, {"gpus": []}, ["ddp"])
    for odd in ("", "[]", '{"machine": {"gpus": []}, "parts": {"x": 3}}'):
        out.write_text(odd)
        with pytest.raises(ValueError, match="is no file of results"):
            script.earlier(out, {"gpus": []}, ["ddp"])


def test_a_rank_that_has_more_rows_than_the_mean_is_seen() -> None:
    above = two_gpus_more.most_above_mean
    assert above([500, 500]) == 0 and above([600, 400]) == pytest.approx(0.2)
    assert above([300]) == 0 and above([0, 10]) == 1


@pytest.mark.thorough
def test_the_parts_about_runs_and_hosts_hold_on_two_cpu_ranks(tmp_path: Path) -> None:
    """In two calls, of which the second keeps what the first found."""
    out, verdicts = tmp_path / "two.json", {}
    for number, parts in enumerate(("fused_exact,bisect,two_hosts,packed", "stalled,two_runs")):
        words = [*TINY, "--parts", parts, "--out", str(out), "--add"]
        work = ["--work", str(tmp_path / f"work{number}"), "--minutes", "5"]
        command = [sys.executable, str(ROOT / "benchmarks/two_gpus.py"), *words, *work]
        done = run(command, timeout_s=290)
        assert done.returncode == 0, done.stdout + done.stderr
        found = json.loads(out.read_text())["parts"]
        verdicts = {title: one["verdict"] for title, one in found.items()}
    assert verdicts == dict.fromkeys(
        ["packed rows, balance", "fused, exact resume", "bisect of a bad update", "two machines",
         "one rank stalled", "two runs at once"], "held",
    )  # fmt: skip
    assert "entered by rank 0, rank 1 does not answer" in found["one rank stalled"]["why"]
    assert found["two machines"]["numbers"]["updates_compared"] == 3
