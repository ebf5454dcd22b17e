"""Runs of two ranks end soon after their report, each of them, under load: for `make soak`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launching import HERE, environment, write_rows


@pytest.mark.skipif(
    not os.environ.get("GLASSLOOP_SOAK"), reason="takes minutes: GLASSLOOP_SOAK=1 or make soak"
)
def test_every_rank_of_a_finished_run_ends(tmp_path: Path, tiny_llama: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 37)
    command = [sys.executable, str(HERE / "ends.py"), str(tmp_path), str(tiny_llama), str(rows)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=3600)
    told = re.search(r"^ends: (\d+) runs .*$", done.stderr, re.M)
    assert done.returncode == 0 and told, done.stderr[-6000:]
    print(f"\n{told[0]}")
