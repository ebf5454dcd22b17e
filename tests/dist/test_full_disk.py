"""A full disk: the run keeps its checkpoints, and says what to do.

The disk is real and small; only the test's process sees it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import HERE, run, write_rows

from glassloop.disk.publish import read
from glassloop.saved.checkpoint import REQUIRED


@pytest.fixture
def words(tmp_path: Path, tiny_llama: Path) -> list[str]:
    rows = write_rows(tmp_path / "rows.jsonl", 37)
    return [
        f"model.id={tiny_llama}", f"data.source={rows}", "data.template=chat",
        "data.max_tokens=96", "lora.r=4", "batch.size=2", "batch.accumulation=1",
        "schedule.updates=12", "schedule.warmup_updates=2", "execution.precision=fp32",
        "execution.preflight=false", "evaluation.samples=0", "record.capsules=0",
        "checkpoint.every_updates=2", "checkpoint.keep=100", f"run.dir={tmp_path / 'disk'}",
        "run.name=full",
    ]  # fmt: skip


def run_on(
    size: str, words: list[str], tmp_path: Path
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Train on a disk of that size; return the end and the folder of what was on the disk."""
    probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "x", "/mnt"]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("mounting a disk needs unshare and the right to mount")
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.mkdir()
    command = [sys.executable, str(HERE / "small_disk.py"), size, str(disk), str(kept), *words]
    return run(command), kept / "full"


def published(folder: Path) -> list[str]:
    """Checkpoints, each of them whole; nothing else lies beside them."""
    found = sorted(path for path in (folder / "checkpoints").iterdir() if path.is_dir())
    for path in found:
        read(path, REQUIRED)
    return [path.name for path in found]


@pytest.mark.parametrize(("on_failure", "done"), [("warn", 12), ("stop", None)])
def test_a_run_on_a_full_disk_keeps_its_checkpoints_and_goes_on_or_stops(
    on_failure: str, done: int | None, words: list[str], tmp_path: Path
) -> None:
    ended, folder = run_on("600k", [*words, f"checkpoint.on_failure={on_failure}"], tmp_path)
    assert ended.returncode == 1, ended.stderr[-3000:]
    assert "Traceback" not in ended.stderr
    kept = published(folder)
    assert 1 <= len(kept) < 6
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    refusals = [event["message"] for event in events if event["kind"] == "warning"]
    assert "No space left on device" in refusals[0]
    assert "free space there, lower checkpoint.keep" in refusals[0]
    updates = [
        json.loads(line)["update"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert updates == list(range(1, (done or 2 * len(kept) + 2) + 1))


def test_a_disk_that_takes_no_line_more_ends_the_run_with_a_message(
    words: list[str], tmp_path: Path
) -> None:
    ended, folder = run_on(
        "40k", [*words, "checkpoint.every_updates=null", "record.probe_every_updates=1"], tmp_path
    )
    assert ended.returncode == 1, ended.stderr[-3000:]
    assert "Traceback" not in ended.stderr
    assert "jsonl cannot be written (No space left on device): free space" in ended.stderr
    for path in folder.glob("*.jsonl"):
        assert all(json.loads(line) for line in path.read_text().splitlines())  # no half line
