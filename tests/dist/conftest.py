"""`glassloop verify`, run once for all tests that read its output."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT, environment

VERIFY = [sys.executable, "-m", "glassloop.cli", "verify", "--device", "cpu"]


@dataclass(frozen=True)
class Verified:
    """What a run of the command gave."""

    code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> dict[str, Any]:
        def refuse(name: str) -> None:
            raise ValueError(f"{name} is not JSON")

        return json.loads(self.stdout, parse_constant=refuse)


def run_verify(*arguments: str, root: Path = ROOT) -> Verified:
    """The command as a user starts it, with the glassloop that lies in `root`."""
    env = environment(PYTHONPATH=str(root))
    done = subprocess.run(
        [*VERIFY, *arguments], cwd=root, env=env, capture_output=True, text=True, timeout=500
    )
    return Verified(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def verified() -> Verified:
    """`glassloop verify --json` on this tree."""
    return run_verify("--json")


@pytest.fixture(scope="session")
def verify_command():
    """The function that runs the command once more."""
    return run_verify
