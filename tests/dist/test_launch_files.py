"""The launch files really start what they say, and a signal to the launcher reaches the ranks."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT, run, start

RANKS = """
import json, os, torch
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
total = accelerator.reduce(torch.ones(1)).item()
line = json.dumps({"rank": accelerator.process_index, "ranks": accelerator.num_processes,
                  "sum": total, "backend": torch.distributed.get_backend(),
                  "device": accelerator.device.type, "precision": accelerator.mixed_precision,
                  "cuda": torch.cuda.device_count()})
os.write(1, (line + "\\n").encode())  # one write, so that two ranks' lines stay apart
accelerator.end_training()
"""
WAITS_FOR_A_SIGNAL = """
import signal, sys, time, torch
stop = []
signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
print("ready", flush=True)
for _ in range(600):
    if stop:
        time.sleep(1)
        print("rank saved", flush=True)
        sys.exit(0)
    time.sleep(0.1)
"""


def launch(name: str, script: Path) -> list[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    return [
        *launcher,
        "--config_file",
        str(ROOT / "accelerate_configs" / f"{name}.yaml"),
        str(script),
    ]


def test_two_ranks_on_a_cpu(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS, encoding="utf-8")
    ran = run(launch("cpu_2proc", script), timeout_s=120)
    assert ran.returncode == 0, ran.stderr
    seen = sorted(
        (json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")),
        key=lambda rank: rank["rank"],
    )
    same = {
        "ranks": 2,
        "sum": 2.0,
        "backend": "gloo",
        "device": "cpu",
        "precision": "no",
        "cuda": 0,
    }
    assert seen == [{"rank": 0, **same}, {"rank": 1, **same}]


@pytest.mark.parametrize(("name", "ranks"), [("single_gpu", 1), ("cpu_2proc", 2)])
def test_a_signal_to_the_launcher_reaches_the_ranks_and_is_waited_for(
    name: str, ranks: int, tmp_path: Path
) -> None:
    script = tmp_path / "waits.py"
    script.write_text(WAITS_FOR_A_SIGNAL, encoding="utf-8")
    output = tmp_path / "output"
    with output.open("w") as file:
        process = start(launch(name, script), stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 90
        while output.read_text().count("ready") < ranks and time.monotonic() < deadline:
            time.sleep(0.1)
        assert output.read_text().count("ready") == ranks, output.read_text()
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        assert output.read_text().count("rank saved") == ranks, output.read_text()
    finally:
        process.kill()
        process.wait()
