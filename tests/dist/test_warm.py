"""A warm process equals a started one in all that a program can tell; its children are warm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from launching import environment, run, start

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or warm.GENUINE is None, reason="processes are forked on Linux alone"
)
TELLS = """
import atexit, json, os, signal, sys, tempfile, threading
told = {
    "argv": sys.argv, "path": sys.path, "name": __name__, "file": globals().get("__file__"),
    "main": sys.modules["__main__"].__dict__ is globals(), "cwd": os.getcwd(),
    "env": {k: v for k, v in os.environ.items() if k != "COLUMNS"}, "parent": os.getppid(),
    "leads": os.getsid(0) == os.getpid(), "group": os.getpgrp() == os.getpid(),
    "open": sorted(int(n) for n in os.listdir("/proc/self/fd"))[:-1],
    "handled": [n for n in signal.valid_signals() if callable(signal.getsignal(n))],
    "ignored": [n for n in signal.valid_signals() if signal.getsignal(n) == signal.SIG_IGN],
    "threads": threading.active_count(), "temporary": tempfile.gettempdir(),
    "ours": [n for n in sys.modules if n.startswith(("glassloop", "train_loop", "warm"))],
    "buffered": [(s.line_buffering, s.write_through, s.encoding) for s in (sys.stdout, sys.stderr)],
    "read": sys.stdin.read(),
}
atexit.register(lambda: print("the end", flush=True))
print(json.dumps(told))
sys.exit(7)
"""


def both(command: list[str], **settings: object) -> list[subprocess.CompletedProcess[str]]:
    return [run(command, cold=cold, **settings) for cold in (True, False)]  # type: ignore[arg-type]


@pytest.mark.parametrize("way", ["script", "-m", "-c", "-u"])
def test_a_program_finds_what_it_finds_in_a_started_process(way: str, tmp_path: Path) -> None:
    (tmp_path / "tells.py").write_text(TELLS)
    words = {
        "script": [str(tmp_path / "tells.py")],
        "-m": ["-m", "tells"],
        "-c": ["-c", TELLS],
        "-u": ["-u", "tells.py"],
    }[way]
    command = [sys.executable, *words, "a", "--b"]
    env = environment(TMPDIR=str(tmp_path), SOME="thing")
    cold, forked = both(command, cwd=tmp_path, env=env, start_new_session=True)
    assert (forked.returncode, forked.stderr) == (cold.returncode, cold.stderr) == (7, "")
    told, end = forked.stdout.splitlines()
    assert end == "the end"
    assert json.loads(told) == json.loads(cold.stdout.splitlines()[0])
    assert json.loads(told)["parent"] == os.getpid()


@pytest.mark.parametrize(
    ("code", "ends"),
    [
        ("raise SystemExit", 0),
        ("raise SystemExit('why')", 1),
        ("raise ValueError('why')", 1),
        ("import os; os._exit(300 & 255)", 44),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("import threading, time; threading.Thread(target=lambda: time.sleep(.2)).start()", 0),
        ("import sys; sys.stdout.write('unflushed')", 0),
        ("import ctypes; ctypes.CDLL(None).printf(b'held back by C')", 0),
    ],
)
def test_it_ends_as_a_started_one(code: str, ends: int) -> None:
    cold, forked = both([sys.executable, "-c", code])
    assert forked.returncode == cold.returncode == ends
    assert forked.stdout == cold.stdout
    assert forked.stderr.splitlines()[-1:] == cold.stderr.splitlines()[-1:]


def test_it_gets_signals_and_is_waited_for_as_a_child() -> None:
    code = "import time; print('there', flush=True); time.sleep(60)"
    process = start([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == "there\n"
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(20) == -signal.SIGTERM
    process.stdout.close()


CHILD = """
import os, signal, sys, tempfile
own = tempfile.TemporaryDirectory()
known = ["torch" in sys.modules, "glassloop" in sys.modules]
print(os.path.exists(sys.argv[1]), *known, signal.getsignal(15) == 0, flush=True)
"""
PARENT = f"""
import atexit, os, signal, subprocess, sys, tempfile
import glassloop
folder = tempfile.TemporaryDirectory()
atexit.register(lambda: print("the parent ends", flush=True))
signal.signal(signal.SIGTERM, lambda *_: None)
print("held back")
env = {{**os.environ, **dict(one.split("=") for one in sys.argv[1:])}}
done = subprocess.run([sys.executable, "-c", {CHILD!r}, folder.name], env=env)
print(done.returncode, os.path.exists(folder.name), flush=True)
"""


@pytest.mark.parametrize(
    ("variable", "warm_too"), [([], True), (["OMP_NUM_THREADS=2"], False)], ids=["same", "other"]
)
def test_what_it_starts_is_warm_unless_imports_would_differ(
    variable: list[str], warm_too: bool
) -> None:
    done = run([sys.executable, "-c", PARENT, *variable])
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    # A started child writes before its parent's buffer is written: "held back" may come second.
    assert lines.pop(lines.index("held back")) and lines == [
        f"True {warm_too} False True",
        "0 True",
        "the parent ends",
    ]


def test_other_programs_and_options_start_as_usual() -> None:
    assert run(["/bin/sh", "-c", "exit 5"]).returncode == 5
    tells = ["-c", "import sys; print('torch' in sys.modules, __debug__)"]
    assert run([sys.executable, *tells]).stdout == "True True\n"
    assert run([sys.executable, "-O", *tells]).stdout == "False False\n"
    assert run([sys.executable, *tells], preexec_fn=os.setsid).stdout == "False True\n"
