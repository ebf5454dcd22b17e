"""A process ends in time: stopped during start-up, without its launcher, or hanging at its end.

Each test runs a small process that does one of these; nothing here loads torch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glassloop.loop.guard import LAUNCHED

PREAMBLE = """
import ctypes, os, signal, sys, threading, time
from glassloop.loop import guard as g
from glassloop.loop.guard import Guard, end_now, end_process, say
from glassloop.loop.signals import StoppedEarly
g.TICK_S, g.EARLY_S, g.LATE_S, g.ORPHAN_S, g.EXIT_S = 0.05, 0.3, 0.3, 0.6, 0.3
libc = ctypes.CDLL(None)
def ready():
    print("ready", flush=True)
"""
# A mutex locked twice: the main thread waits in C code, where no Python handler runs.
HANG = "mutex = ctypes.create_string_buffer(64); [libc.pthread_mutex_lock(mutex) for _ in (1, 2)]"


def started(body: str, **env: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + body],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
    )
    assert process.stdout is not None
    told = b""
    while not told.endswith(b"\n"):  # not through its buffer, which would take more
        told += os.read(process.stdout.fileno(), 1) or b"\n"
    assert told == b"ready\n", process.communicate(timeout=10)
    return process


def hangs(process: subprocess.Popen[str]) -> None:
    """Wait until the main thread waits for its mutex."""
    until = time.monotonic() + 10
    while "futex" not in Path(f"/proc/{process.pid}/wchan").read_text():
        assert time.monotonic() < until
        time.sleep(0.01)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        output, errors = process.communicate(timeout=10)
    finally:
        process.kill()
    return process.returncode, output + errors


EARLY = """
with Guard(launched=False) as guard:
    try:
        guard.starts(); ready()
        {doing}
    except StoppedEarly as why:
        say(f"stopped by {{why}}")
        code = guard.stop.exit_code or 1
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 1), (signal.SIGHUP, 1), (signal.SIGQUIT, 1)],
)
def test_a_stop_during_start_up_ends_with_a_sentence(number: signal.Signals, code: int) -> None:
    process = started(EARLY.format(doing="time.sleep(20)"))
    process.send_signal(number)
    assert ended(process) == (code, f"stopped by {number.name}\n")


def test_a_start_up_that_is_blocked_in_a_library_ends_all_the_same() -> None:
    process = started(EARLY.format(doing=HANG))
    hangs(process)
    process.send_signal(signal.SIGTERM)
    code, told = ended(process)
    assert code == 1
    assert "rank 0: asked to end (SIGTERM), it has not within 0 s: it ends here" in told


RUN = """
with Guard(launched={launched}) as guard:
    guard.starts(); guard.begins(); ready()
    {doing}
    print(guard.stop.by, guard.stop.exit_code)
"""
UNTIL_ASKED = "while not guard.stop.asked: time.sleep(0.01)"


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"])
def test_a_stop_in_a_run_sets_its_flag(number: str) -> None:
    process = started(RUN.format(launched=False, doing=UNTIL_ASKED))
    process.send_signal(signal.Signals[number])
    assert ended(process) == (0, f"{number} {130 if number == 'SIGINT' else 0}\n")


def test_the_flag_is_set_while_the_main_thread_is_blocked_in_a_library() -> None:
    seen = (
        "threading.Thread(target=lambda: ([time.sleep(0.01) for _ in iter(lambda: guard.stop.asked,"
        f" True)], end_now('seen', 7)), daemon=True).start(); {HANG}"
    )
    process = started(RUN.format(launched=False, doing=seen))
    hangs(process)
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 7


@pytest.mark.parametrize("ignored", ["SIGHUP", "SIGQUIT"])
def test_a_signal_that_nohup_or_a_shell_ignores_stays_ignored(ignored: str) -> None:
    body = f"signal.signal(signal.{ignored}, signal.SIG_IGN)\n" + RUN.format(
        launched=False, doing=f"os.kill(os.getpid(), signal.{ignored}); time.sleep(0.1)"
    )
    assert ended(started(body)) == (0, "None 0\n")


LAUNCHER = """
import os, subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (RUN.format(launched=True, doing=UNTIL_ASKED), "the launcher, process {pid}, is gone 0"),
        (
            EARLY.format(doing="time.sleep(20)").replace("launched=False", "launched=True"),
            "stopped by the launcher, process {pid}, is gone",
        ),
        (
            RUN.format(launched=True, doing=HANG),
            "rank 0: the launcher, process {pid}, is gone for 1 s: it ends here, with exit code 1",
        ),
    ],
    ids=["in a run", "during start-up", "in a run that hangs"],
)
def test_a_rank_whose_launcher_is_killed_ends(body: str, told: str) -> None:
    read, write = os.pipe()
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, PREAMBLE + body], stdout=write, stderr=write
    )
    os.close(write)
    with os.fdopen(read) as stream:
        assert stream.readline() == "ready\n"
        launcher.kill()
        launcher.wait()
        said = stream.read()  # until the rank has ended too
    assert told.format(pid=launcher.pid) in said


def test_a_run_without_a_launcher_outlives_its_shell() -> None:
    body = RUN.format(launched=None, doing="time.sleep(0.5)")
    read, write = os.pipe()
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    shell = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, PREAMBLE + body], stdout=write, stderr=write, env=env
    )
    os.close(write)
    with os.fdopen(read) as stream:
        assert stream.readline() == "ready\n"
        shell.kill()
        shell.wait()
        assert stream.read() == "None 0\n"


END = """
with Guard(launched=False) as guard:
    guard.begins()
    guard.code = 0
    with guard.within({seconds}, "closing the run"):
        ready()
        {doing}
    print("closed")
"""


def test_an_end_that_hangs_is_cut_off_with_the_runs_own_exit_code() -> None:
    code, told = ended(started(END.format(seconds=0.3, doing=HANG)))
    assert code == 0
    assert "rank 0: closing the run took over 0 s: it ends here, with exit code 0" in told


def test_a_signal_shortens_an_end_that_hangs() -> None:
    process = started(END.format(seconds=60, doing=HANG))
    hangs(process)
    process.send_signal(signal.SIGTERM)
    code, told = ended(process)
    assert (code, "asked to end (SIGTERM), it has not within 0 s" in told) == (0, True)


def test_an_end_in_time_is_left_alone() -> None:
    body = END.format(seconds=0.3, doing="pass") + "    time.sleep(0.6)\n"
    assert ended(started(body)) == (0, "closed\n")


def test_afterwards_signals_do_what_they_did_before() -> None:
    process = started("with Guard(launched=False): pass\nready(); time.sleep(20)")
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == -signal.SIGTERM


@pytest.mark.parametrize(
    "hanging",
    [
        "import atexit; atexit.register(time.sleep, 20)",
        "threading.Thread(target=time.sleep, args=(20,)).start()",
        f"import atexit\ndef late():\n    {HANG}\natexit.register(late)",
    ],
    ids=["an exit function", "a thread", "a library"],
)
def test_a_process_leaves_whatever_hangs_at_exit(hanging: str) -> None:
    began = time.monotonic()
    assert ended(started(f"{hanging}\nready(); end_process(3)"))[0] == 3
    assert time.monotonic() - began < 10


def test_exit_functions_run_and_output_is_written() -> None:
    body = "import atexit; atexit.register(print, 'bye'); ready(); print('last'); end_process(0)"
    assert ended(started(body)) == (0, "last\nbye\n")


def test_an_end_is_not_held_up_by_a_screen_that_takes_nothing() -> None:
    read, write = os.pipe()
    body = "os.set_blocking(2, True); os.write(2, b'x' * 65536)\nend_now('full', 5)"
    process = subprocess.Popen([sys.executable, "-c", PREAMBLE + body], stderr=write)
    try:
        assert process.wait(timeout=10) == 5
    finally:
        process.kill()
        os.close(read)
        os.close(write)


def test_a_workers_signals_are_not_the_runs() -> None:
    """Pools end their forked workers with SIGTERM."""
    fork = (
        "child = os.fork()\n    if child == 0: time.sleep(20); os._exit(9)\n    "
        "os.kill(child, signal.SIGTERM); status = os.waitpid(child, 0)[1]; time.sleep(0.2)\n    "
        "print(os.waitstatus_to_exitcode(status))"
    )
    process = started(RUN.format(launched=False, doing=fork))
    assert ended(process) == (0, "-15\nNone 0\n")
