"""A run's folder has one writer, also without locks."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from glassloop.disk import lock
from glassloop.disk.lock import LOCK, FolderMoved, Held, Holder, hold

HOLDER = """
import sys
from pathlib import Path
from glassloop.disk import lock
lock.BEAT_S = 0.05
held = lock.hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds tmp_path / "run"."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse flock, as NFS without a lock manager does."""

    def refuse(_handle: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    monkeypatch.setattr(lock, "WATCH_S", 0.3)
    monkeypatch.setattr(lock, "SETTLE_S", 0.05)


def named(folder: Path, **other: object) -> Path:
    """A lock file that names a holder: this process, but for `other`."""
    folder.mkdir()
    holder = dataclasses.replace(lock._myself(), **other)  # pyright: ignore[reportArgumentType]
    (folder / LOCK).write_text(json.dumps(dataclasses.asdict(holder)))
    return folder


def test_a_second_writer_is_refused_with_holder_and_cure(
    tmp_path: Path, other: subprocess.Popen[str]
) -> None:
    with pytest.raises(Held) as refused:
        hold(tmp_path / "run")
    told = str(refused.value)
    assert f"{tmp_path / 'run'} is being written by process {other.pid} on " in told
    assert ", since 2" in told
    assert f"kill -TERM {other.pid}" in told
    assert "wait for its end" in told


def test_a_killed_writer_holds_nothing(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()
    began = time.monotonic()
    held = hold(tmp_path / "run")
    assert time.monotonic() - began < lock.WATCH_S  # the system's lock tells: nothing is watched
    assert held.notes == ()
    held.release()


def test_a_writer_that_ends_lets_the_next_one_in_and_leaves_no_file(tmp_path: Path) -> None:
    for _ in range(2):
        held = hold(tmp_path / "run")
        (tmp_path / "run" / "config.yaml").touch()
        held.release()
        held.release()
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_folder_made_for_a_run_that_is_refused_does_not_stay(tmp_path: Path) -> None:
    hold(tmp_path / "runs" / "new").release()
    assert not (tmp_path / "runs" / "new").exists()
    (tmp_path / "mine").mkdir()
    hold(tmp_path / "mine").release()
    assert (tmp_path / "mine").exists()  # it was there before


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    held = hold(tmp_path / "run")
    ready, go = os.pipe()
    born, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go)
        os.write(told, b"x")
        os.read(ready, 1)  # lives on until the parent closes its end
        os._exit(0)
    os.read(born, 1)
    try:
        os.close(held._handle)  # as the end of the parent does
        lock._held.discard(held._handle)
        held._over.set()
        hold(tmp_path / "run").release()
    finally:
        for handle in (go, ready, born, told):
            os.close(handle)
        os.waitpid(child, 0)


@pytest.mark.usefixtures("without_locks")
def test_without_locks_a_living_process_of_this_host_is_refused_and_a_dead_one_replaced(
    tmp_path: Path,
) -> None:
    held = hold(tmp_path / "run")
    assert "has no locks: run.lock and its age alone refuse a second writer" in held.notes[0]
    with pytest.raises(Held, match=f"process {os.getpid()} on .* last sign of life 0 s ago"):
        hold(tmp_path / "run")
    held.release()
    reused = named(tmp_path / "reused", started=1)  # the pid lives, but is another process
    hold(reused).release()


@pytest.mark.parametrize("locks", [True, False], ids=["locks of the host alone", "no locks"])
def test_a_holder_on_another_host_counts_while_it_beats(
    locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if not locks:
        request.getfixturevalue("without_locks")
    folder = named(tmp_path / "run", host="far", machine="another boot", pid=1)
    said: list[str] = []
    beats: Callable[[float], None] = lambda _seconds: os.utime(folder / LOCK)  # noqa: E731
    with monkeypatch.context() as during:
        during.setattr(lock.time, "sleep", beats)
        with pytest.raises(Held, match="process 1 on far"):
            hold(folder, said.append)
    assert "watching for 0 s whether it still writes" in said[0]
    os.utime(folder / LOCK, (1, time.time() - 7200))
    held = hold(folder)
    assert "named process 1 on far" in held.notes[-1]
    assert "without a sign of life for 7200 s: taken over" in held.notes[-1]
    held.release()


def test_of_two_hosts_that_take_over_at_once_the_later_one_keeps_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = named(tmp_path / "run", host="far", machine="another boot", pid=1)
    later = dataclasses.replace(lock._myself(), host="third", machine="a third boot")
    sleep = time.sleep

    def meanwhile(seconds: float) -> None:
        if seconds == lock.SETTLE_S:
            (folder / LOCK).write_text(json.dumps(dataclasses.asdict(later)))
        sleep(seconds)

    monkeypatch.setattr(lock.time, "sleep", meanwhile)
    with pytest.raises(Held, match="on third"):
        hold(folder)


def test_a_run_that_stood_still_and_was_taken_over_learns_it(tmp_path: Path) -> None:
    held = hold(tmp_path / "run")
    held.check()
    later = dataclasses.replace(lock._myself(), host="third")
    (tmp_path / "run" / LOCK).write_text(json.dumps(dataclasses.asdict(later)))
    until = time.monotonic() + 5
    while held._taken is None and time.monotonic() < until:
        time.sleep(0.01)
    with pytest.raises(FolderMoved, match=r"taken over by process .* on third"):
        held.check()
    held.release()


def test_a_holder_gives_signs_of_life(tmp_path: Path) -> None:
    held = hold(tmp_path / "run")
    os.utime(held.path, (1, 1))
    until = time.monotonic() + 5
    while held.path.stat().st_mtime < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert time.time() - held.path.stat().st_mtime < 5
    held.release()


def test_a_renamed_folder_is_noticed_with_its_new_name(tmp_path: Path) -> None:
    held = hold(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").touch()
    (tmp_path / "run").rename(tmp_path / "best")
    with pytest.raises(FolderMoved) as moved:
        held.check()
    assert f"was renamed in mid-run, its files are in {tmp_path / 'best'}" in str(moved.value)
    assert f"--resume {tmp_path / 'best'}" in str(moved.value)
    held.release()
    assert not (tmp_path / "best" / LOCK).exists()
    assert (tmp_path / "best" / "config.yaml").exists()


def test_a_folder_that_is_out_of_reach_for_a_moment_is_not_called_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = hold(tmp_path / "run")

    def stale(_path: Path) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as during:
        during.setattr(lock.os, "lstat", stale)
        held.check()
    held.release()


@pytest.mark.parametrize("way", ["removed", "replaced"])
def test_a_lock_file_that_goes_ends_the_run(way: str, tmp_path: Path) -> None:
    held = hold(tmp_path / "run")
    held.path.unlink()
    if way == "replaced":
        held.path.touch()
    with pytest.raises(FolderMoved, match="was removed or replaced in mid-run"):
        held.check()
    held.release()


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "folder"])
def test_a_strange_lock_file_is_refused_and_not_opened(kind: str, tmp_path: Path) -> None:
    folder, target = tmp_path / "run", tmp_path / "target"
    folder.mkdir()
    target.write_text("theirs")
    if kind == "link":
        (folder / LOCK).symlink_to(target)
    elif kind == "hard link":
        os.link(target, folder / LOCK)
    elif kind == "pipe":
        os.mkfifo(folder / LOCK)
    else:
        (folder / LOCK).mkdir()
    with pytest.raises(ValueError, match=r"run\.lock is a (.*, not a plain file|hard link)"):
        hold(folder)
    assert target.read_text() == "theirs"


@pytest.mark.parametrize("text", ["", "5", "{}", '{"host": 1}', "[" * 9000, "\x1b[2J"])
def test_a_holder_that_cannot_be_read_is_watched_and_replaced(text: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).write_text(text)
    held = hold(tmp_path / "run")
    assert "named no holder that can be read" in held.notes[0]
    held.release()


def test_what_a_lock_file_says_cannot_move_the_cursor() -> None:
    assert str(Holder("a\x1b[2J", "m", 1, 1, "2026", "b\nc")) == (
        "process 1 on a?[2J, since 2026 (b?c)"
    )


def test_a_folder_that_cannot_be_written_is_refused_with_the_cure(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot be written \(.*\): make it writable for this user"):
        hold(tmp_path / "file" / "run")
