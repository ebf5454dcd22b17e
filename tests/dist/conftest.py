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
from launching import HERE, ROOT, environment, run
from schemas import conform

WHOLE = ("glassloop.cli", "verify")
PART = ("verify_part", "command")  # what a session without thorough tests asks for


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


def run_verify(*arguments: str, root: Path = ROOT, module: tuple[str, str] = WHOLE) -> Verified:
    """The command as a user starts it, with the glassloop that lies in `root`."""
    env = environment(PYTHONPATH=os.pathsep.join([str(root), str(HERE)]))
    command = [sys.executable, "-m", *module, "--device", "cpu", *arguments]
    done = run(command, cwd=root, env=env, timeout_s=500)
    return Verified(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def verified(request: pytest.FixtureRequest) -> Verified:
    """`glassloop verify --json` on this tree, run once for all workers of pytest-xdist.

    A session without thorough tests runs a part of the class (verify_part.py).

    GLASSLOOP_VERIFIED: path without .json and .log of what it printed, where it has just passed on
    this tree.
    """
    if made := os.environ.get("GLASSLOOP_VERIFIED"):
        return Verified(0, *(Path(made + end).read_text("utf-8") for end in (".json", ".log")))
    module = PART if "not thorough" in request.config.getoption("markexpr") else WHOLE
    kept = apart.SESSION / "verified.json"
    with open(apart.SESSION / "verified.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            kept.write_text(json.dumps(vars(run_verify("--json", module=module))))
    return Verified(**json.loads(kept.read_text()))


@pytest.fixture(scope="session")
def verify_command():
    """The function that runs the command once more."""
    return run_verify
