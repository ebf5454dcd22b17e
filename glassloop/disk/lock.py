"""Let one process write a run's folder, and name its holder.

The file `run.lock` is locked (flock) while a run writes, so a crash releases it. It also says who
holds it: for the message of a refusal, for hosts that the lock does not reach, and for file systems
without locks. There a holder counts while its process lives or, on another host, while its file
still beats. Everything here is of the standard library.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from glassloop.disk.environment import command_line
from glassloop.disk.opening import open_plain
from glassloop.disk.publish import make

LOCK = "run.lock"
BEAT_S = 5.0  # between two signs of life of a holder
WATCH_S = 30.0  # without one, a holder on another host counts as gone
SETTLE_S = 2.0  # for hosts that take over at one moment: the last one to write keeps it
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # a disk without locks
LONGEST = 65536  # bytes of a lock file that are read

_held: set[int] = set()  # descriptors of held locks


class Held(ValueError):
    """Raised where another process writes into the folder."""


class FolderMoved(OSError):
    """The folder's name no longer leads to the run's files."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock."""

    host: str
    machine: str  # boot and pid namespace: where they are equal, `pid` can be looked up
    pid: int
    started: int  # clock ticks since boot; tells a pid's next user apart
    since: str  # local time
    command: str

    def __str__(self) -> str:
        command = self.command if len(self.command) <= 120 else f"{self.command[:117]}..."
        words = f"process {self.pid} on {self.host}, since {self.since} ({command})"
        return "".join(char if char.isprintable() else "?" for char in words)


class FolderLock:
    """A held lock, with a sign of life every `BEAT_S`.

    Args:
        made: the folder was made for this lock.
        notes: what a user should know, a sentence each.
    """

    def __init__(
        self, folder: Path, handle: int, holder: Holder, *, made: bool, notes: tuple[str, ...] = ()
    ) -> None:
        self.folder, self.path, self.notes = folder, folder / LOCK, notes
        self._handle, self._holder, self._made = handle, holder, made
        self._taken: Holder | None = None  # who took it over while this process stood still
        self._over = threading.Event()
        self._beating = threading.Lock()
        threading.Thread(target=self._beat, name="run.lock", daemon=True).start()

    def check(self) -> None:
        """Raise FolderMoved unless the folder is still the one that was locked."""
        if self._over.is_set():
            return
        if self._taken is not None:
            raise FolderMoved(
                f"{self.folder} was taken over by {self._taken} while this process stood still: "
                "this run ends, so that its folder has one writer"
            )
        try:
            path = self._path_now()
        except OSError:
            return  # out of reach just now: what the disk refuses is said where it is written
        if path == self.path:
            return
        if path is not None:
            raise FolderMoved(
                f"{self.folder} was renamed in mid-run, its files are in {path.parent}: the run "
                f"ends, so that its record is not split. Resume it with "
                f"--resume {shlex.quote(str(path.parent))}"
            )
        raise FolderMoved(
            f"{self.path} was removed or replaced in mid-run: the run ends, since another could "
            f"write there too. Resume it from its last checkpoint: "
            f"--resume {shlex.quote(str(self.folder))}"
        )

    def release(self) -> None:
        """Let the next writer in; remove an empty new folder."""
        if self._over.is_set():
            return
        self._over.set()
        with contextlib.suppress(OSError):  # a disk that refuses: the process's end releases it
            path = self._path_now()
            if path is not None:
                path.unlink()
                if self._made:
                    path.parent.rmdir()  # the system refuses it where a run has begun there
        if self._beating.acquire(timeout=BEAT_S):  # else a disk hangs, and the descriptor stays
            _held.discard(self._handle)
            os.close(self._handle)

    def _path_now(self) -> Path | None:
        """Where the locked file lies; None if it was removed."""
        for path in (self.path, Path(os.readlink(f"/proc/self/fd/{self._handle}"))):
            if _leads_to(path, self._handle):
                return path
        return None

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            with self._beating:
                if self._over.is_set():
                    return
                try:
                    now = _read(self._handle)
                    if now is not None and now != self._holder:
                        self._taken = now
                        return
                    os.utime(self._handle)
                except OSError:
                    continue  # what the disk refuses is said where the record is written


def hold(folder: Path, say: Callable[[str], None] = lambda line: None) -> FolderLock:
    """Lock a run's folder; make it where it is missing.

    Args:
        say: takes a line for people before another host's holder is watched (up to `WATCH_S`).

    Raises:
        Held: names the folder, its holder and the cure.
        NotPlain: run.lock is a link, a FIFO or the like.
        OSError: the folder cannot be written; names the cure.
    """
    made = not folder.is_dir()
    while True:
        handle, fresh = _opened(folder)
        try:
            holder = _myself()
            notes = _won(folder, handle, holder, fresh=fresh, say=say)
            if notes is not None:
                _held.add(handle)
                return FolderLock(folder, handle, holder, made=made, notes=notes)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _opened(folder: Path) -> tuple[int, bool]:
    """Open the folder's lock file; say whether it is new."""
    path = folder / LOCK
    try:
        make(folder)
        while True:
            with contextlib.suppress(FileExistsError):
                return open_plain(path, os.O_RDWR | os.O_CREAT | os.O_EXCL), True
            with contextlib.suppress(FileNotFoundError):  # removed in between
                return open_plain(path, os.O_RDWR), False
    except OSError as error:
        raise OSError(
            error.errno,
            f"{folder} cannot be written ({error.strerror}): make it writable for this user, or "
            "set run.dir to a folder that is",
        ) from error


def _won(
    folder: Path, handle: int, mine: Holder, *, fresh: bool, say: Callable[[str], None]
) -> tuple[str, ...] | None:
    """Lock the open file and write its holder.

    Returns notes; None: it was removed, begin again."""
    locks, notes = _locked(folder, handle), []
    if not locks:
        notes.append(
            f"the file system of {folder} has no locks: {LOCK} and its age alone refuse a second "
            "writer"
        )
    before = _read(handle)
    if before is not None and before.machine == mine.machine:
        if not locks and _start_of(before.pid) == before.started:
            raise Held(_refusal(folder, before, handle))
    elif not fresh:
        notes.append(_watched(folder, handle, before, say))
    if not _leads_to(folder / LOCK, handle):
        return None
    data = json.dumps(dataclasses.asdict(mine)).encode()
    os.pwrite(handle, data, 0)
    os.ftruncate(handle, len(data))
    if notes:
        time.sleep(SETTLE_S)
        if (now := _read(handle)) != mine:
            raise Held(_refusal(folder, now, handle))
    return tuple(notes)


def _locked(folder: Path, handle: int) -> bool:
    """Take the system's lock. False: the file system has none. Raises Held."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Held(_refusal(folder, _read(handle), handle)) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _watched(folder: Path, handle: int, before: Holder | None, say: Callable[[str], None]) -> str:
    """Wait for a sign of life of a holder elsewhere.

    Returns a note; raises Held."""
    path, who = folder / LOCK, before or "no holder that can be read"
    age_s = _age_s(handle)
    say(f"{path} names {who}: watching for {WATCH_S:.0f} s whether it still writes")
    first, until = _mark(path), time.monotonic() + WATCH_S
    while time.monotonic() < until:
        time.sleep(min(1.0, WATCH_S / 4))
        if (now := _mark(path)) is None:
            break  # it has ended in good order
        if now != first:
            raise Held(_refusal(folder, _read(handle), handle))
    return f"{path} named {who}, without a sign of life for {age_s:.0f} s: taken over"


def _refusal(folder: Path, holder: Holder | None, handle: int) -> str:
    age = f"last sign of life {_age_s(handle):.0f} s ago"
    if holder is None:
        return f"{folder} is being written by another process ({age}): wait for its end"
    return (
        f"{folder} is being written by {holder}, {age}: wait for its end, or end it with a "
        f"checkpoint (kill -TERM {holder.pid} there); a new run can take another run.name"
    )


def _myself() -> Holder:
    pid = os.getpid()
    return Holder(
        host=socket.gethostname(),
        machine=_machine(),
        pid=pid,
        started=_start_of(pid) or 0,
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        command=" ".join(command_line(sys.argv))[:1000],
    )


def _machine() -> str:
    """Names this boot of this kernel, and the namespace of its pids."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _start_of(pid: int) -> int | None:
    """Return clock ticks from boot to a process's start, or None."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()
    return None if state == "Z" else int(fields[18])


def _read(handle: int) -> Holder | None:
    """Who the lock file names; None if it names nobody."""
    try:
        found = json.loads(os.pread(handle, LONGEST, 0))
        holder = Holder(**{field.name: found[field.name] for field in dataclasses.fields(Holder)})
    except (ValueError, KeyError, TypeError, RecursionError):  # written by a stranger, or torn
        return None
    plain = all(isinstance(text, str) for text in (holder.host, holder.machine, holder.since))
    return holder if plain and isinstance(holder.pid, int) and holder.pid > 0 else None


def _age_s(handle: int) -> float:
    """Seconds since the file's last sign of life, by this host's clock."""
    return max(0.0, time.time() - os.fstat(handle).st_mtime)


def _mark(path: Path) -> tuple[int, int, int] | None:
    """Read what each sign of life changes, on a network disk too."""
    try:
        handle = open_plain(path)
    except FileNotFoundError:
        return None
    try:
        found = os.fstat(handle)
    finally:
        os.close(handle)
    return found.st_ino, found.st_size, found.st_mtime_ns


def _leads_to(path: Path, handle: int) -> bool:
    """Whether the path names the open file."""
    try:
        there = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    here = os.fstat(handle)
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def _forget() -> None:
    """Close the parent's locks in a forked child."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_forget)
