"""Each benchmark finds what it imports, whichever test ran before it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"

ALL = """
import importlib, pathlib, sys
for script in sorted(pathlib.Path(sys.argv[1]).glob("*.py")):
    importlib.import_module(script.stem)
    print(script.name)
"""


@pytest.mark.thorough
def test_every_script_imports_in_a_process_of_its_own() -> None:
    """A script finds its neighbours and the package as `python benchmarks/NAME.py` does."""
    command = [sys.executable, "-c", ALL, str(BENCHMARKS)]
    found = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": f"{BENCHMARKS}:{BENCHMARKS.parent}", "PATH": "/usr/bin:/bin"},
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert len(found.stdout.split()) == len(list(BENCHMARKS.glob("*.py")))
