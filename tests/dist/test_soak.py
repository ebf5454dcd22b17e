"""A killed run resumes to the end of an undisturbed run, bit for bit.

Rows, losses, norms, optimizer and adapter are compared, for a sample of kills; `make soak` does
all kills.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from launching import HERE, run, write_rows

ALL = bool(os.environ.get("GLASSLOOP_SOAK"))
SAMPLE = ["--every", "23", "--random", "4", "--launched", "0"]


@pytest.mark.thorough
def test_a_run_killed_at_any_moment_goes_on_to_the_same_end(
    tmp_path: Path, tiny_llama: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 37)
    command = [
        sys.executable,
        str(HERE / "soak.py"),
        str(tmp_path),
        str(tiny_llama),
        str(rows),
        *([] if ALL else SAMPLE),
    ]
    done = run(command, timeout_s=3600)
    counts = re.search(r"^kills: (\d+) .*$", done.stderr, re.M)
    assert done.returncode == 0 and counts, done.stderr[-6000:]
    print(f"\n{counts[0]}")
    assert int(counts[1]) >= (200 if ALL else 15)
    if ALL:
        launched = re.search(r"(\d+) launched, two ranks", counts[0])
        assert launched and int(launched[1]) >= 20
