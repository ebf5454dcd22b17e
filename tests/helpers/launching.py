"""Starts a script of this folder on two CPU ranks through `accelerate launch`, as a user would start train_loop.py."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TWO_CPUS = ROOT / "accelerate_configs" / "cpu_2proc.yaml"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]


def environment(**extra: str) -> dict[str, str]:
    """The environment of a launched process: offline, one thread a rank, glassloop importable."""
    paths = os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")])
    quiet = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": paths,
    }
    return {**os.environ, **quiet, **extra}


def launch(
    script: str | Path,
    *arguments: str,
    expect: int = 0,
    timeout_s: int = 300,
    config_file: Path = TWO_CPUS,
    **env: str,
) -> str:
    """Run `script` on two ranks; returns what it printed. Fails the test, with the output, on another exit code than `expect`."""
    done = subprocess.run(
        [*LAUNCH, str(config_file), str(script), *arguments],
        cwd=ROOT,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    output = done.stdout + done.stderr
    assert done.returncode == expect, (
        f"exit code {done.returncode}, expected {expect}:\n{output[-6000:]}"
    )
    return output


def write_rows(path: Path, rows: int) -> Path:
    """A jsonl file of prompts and completions of 1 to 14 and 1 to 9 words; the same at each call."""
    words = [
        "the",
        "caller",
        "asks",
        "for",
        "a",
        "code",
        "and",
        "the",
        "receiver",
        "hangs",
        "up",
        "because",
        "nothing",
        "can",
        "be",
        "checked",
        "today",
    ]
    drawn = random.Random(5)
    lines = [
        {
            "prompt": " ".join(drawn.choices(words, k=drawn.randint(1, 14))),
            "completion": " ".join(drawn.choices(words, k=drawn.randint(1, 9))),
        }
        for _ in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
