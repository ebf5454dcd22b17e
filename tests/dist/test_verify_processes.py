"""Processes of a verification that die, hang or are ended."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from glassloop.cli import verify as command
from glassloop.verify.processes import MARK, Part, PartFailed, run_parts


def part(code: str) -> Part:
    return Part("one process", (sys.executable, "-c", code), dict(os.environ))


def test_a_process_that_dies_ends_the_command_with_its_last_words(tmp_path):
    said = f"b'{MARK}' + str(os.getpid()).encode() + b' 3 of 9: a member\\n'"
    code = f"import os; os.write(1, {said}); print('out of luck'); raise SystemExit(7)"
    waits = part("import time; time.sleep(100)")
    started = time.monotonic()
    with pytest.raises(
        PartFailed,
        match=r"one process ended with exit code 7 \(it was at: 3 of 9: a member\)"
        r"(?s:.*)out of luck",
    ):
        run_parts([part(code), waits], patience_s=60, say=print, cwd=tmp_path)
    assert time.monotonic() - started < 30, "the other part is ended too"


HANGS = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if sys.argv[1:]:
    os.write(1, f"@verify {os.getpid()} 1 of 2: hangs\\n".encode())
else:
    rank = subprocess.Popen([sys.executable, __file__, "rank"], start_new_session=True)
    open("rank.pid", "w").write(str(rank.pid))
time.sleep(600)
"""


@pytest.mark.thorough
def test_processes_that_hang_are_ended_within_the_stated_time(tmp_path):
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    hangs = Part("two processes", (sys.executable, str(script)), dict(os.environ))
    started = time.monotonic()
    with pytest.raises(
        PartFailed, match=r"has said nothing for 2 s and was ended \(it was at: 1 of 2: hangs\)"
    ):
        run_parts([hangs], patience_s=2, say=print, cwd=tmp_path)
    assert time.monotonic() - started < 60
    pid = int((tmp_path / "rank.pid").read_text())
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and alive(pid):
        time.sleep(0.1)
    assert not alive(pid), "a rank in a session of its own, deaf to SIGTERM, lives on"


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_a_signal_ends_the_processes_and_removes_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(command.tempfile, "tempdir", str(tmp_path))
    started = []

    def run(folder: Path, *_: object) -> dict:
        started.append(folder)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        return {}

    monkeypatch.setattr(command, "_run", run)
    with pytest.raises(SystemExit) as ended:
        command.main(["--device", "cpu"])
    assert ended.value.code == 128 + signal.SIGTERM
    assert started and not started[0].exists()
