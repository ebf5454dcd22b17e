"""`glassloop verify`, run once for all tests that read its output."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apart
import pytest
from launching import ROOT, environment, run
from schemas import conform

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

        return conform("verify", json.loads(self.stdout, parse_constant=refuse))


def run_verify(*arguments: str, root: Path = ROOT) -> Verified:
    """The command as a user starts it, with the glassloop that lies in `root`."""
    env = environment(PYTHONPATH=str(root))
    done = run([*VERIFY, *arguments], cwd=root, env=env, timeout_s=500)
    return Verified(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def verified() -> Verified:
    """`glassloop verify --json` on this tree, run once for all workers of pytest-xdist.

    GLASSLOOP_VERIFIED: path without .json and .log of what it printed, where it has just passed on
    this tree.
    """
    if made := os.environ.get("GLASSLOOP_VERIFIED"):
        return Verified(0, *(Path(made + end).read_text("utf-8") for end in (".json", ".log")))
    kept = apart.SESSION / "verified.json"
    with open(apart.SESSION / "verified.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            kept.write_text(json.dumps(vars(run_verify("--json"))))
    return Verified(**json.loads(kept.read_text()))


@pytest.fixture(scope="session")
def verify_command():
    """The function that runs the command once more."""
    return run_verify
