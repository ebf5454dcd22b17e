"""benchmarks/one_gpu.py on a CPU, and the script that starts it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from launching import ROOT, environment, run

TINY = ["--device", "cpu", "--model", "random:tiny", "--updates", "4"]


@pytest.mark.thorough
def test_a_limited_run_a_kill_and_a_streamed_base_in_one_command(tmp_path: Path) -> None:
    out, work = tmp_path / "one.json", tmp_path / "work"
    command = [sys.executable, str(ROOT / "benchmarks" / "one_gpu.py"), *TINY, "--out", str(out)]
    command += ["--work", str(work), "--parts", "limited,killed,half_bus,card", "--minutes", "5"]
    done = run(command, timeout_s=290)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(out.read_text())
    parts = told["parts"]
    assert {name: one["verdict"] for name, one in parts.items()} == {
        "limited": "held",
        "killed": "held",
        "half_bus": "held",
        "card": "left out",
    }
    killed = parts["killed"]["numbers"]
    assert killed["differing"] == [] and killed["replay_bit_for_bit"] is True
    assert killed["commands"]["cut"]["code"] == -9 and killed["done_again"][-1] == 6
    assert parts["half_bus"]["numbers"]["64 tokens"]["gradient equal"] is True
    assert parts["limited"]["numbers"]["updates"] == 4 and parts["limited"]["git"]
    assert (work / "killed" / "resumed.log").is_file()


def test_the_script_starts_it_from_anywhere(tmp_path: Path) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/bin/sh\necho "$PWD|$NCCL_NVLS_ENABLE|$PYTHONPATH|$*"\nexit 3\n')
    stand_in.chmod(0o755)
    command = ["bash", str(ROOT / "benchmarks" / "one_gpu.sh"), "--parts", "card"]
    done = run(command, timeout_s=20, env=environment(PYTHON=str(stand_in), PYTHONPATH="/mine"))
    assert done.returncode == 3
    assert done.stdout == f"{ROOT}|0|{ROOT}:/mine|benchmarks/one_gpu.py --parts card\n"
