"""Liveness of the ranks: each says what it does.

A rank whose partner is gone, or that waits too long, ends itself and says why.

A collective whose partner died may wait for ever (NCCL) or fail at once (gloo). Positions lie in
the run's folder, one small file a rank, written once a second by a thread that runs on while the
main thread waits. Ranks on hosts that do not share that folder are not seen; for them
execution.collective_timeout_s decides alone.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from glassloop.disk.opening import read_plain, require_plain_folder
from glassloop.disk.publish import replace_file
from glassloop.loop.collectives import asked, stuck_in, write_dump

# From a partner's end, or a termination signal that nobody answers, to this rank's own; a launcher
# kills after 30
PATIENCE_S = 10.0
TICK_S = 1.0
ANSWER_S = 5 * TICK_S  # for the others to write their collectives
# How much longer the process group itself waits: a collective that it gave up counts as ended
GROUP_S = 3 * ANSWER_S


@dataclass(frozen=True)
class Position:
    """The last word of a rank."""

    rank: int
    host: str
    pid: int
    update: int
    doing: str
    since: float  # seconds since the epoch

    @property
    def gone(self) -> bool:
        """True if its process died on this host, not in good order."""
        return self.doing != ENDED and self.host == socket.gethostname() and not _alive(self.pid)

    def __str__(self) -> str:
        fate = (
            f"process {self.pid} is gone" if self.gone else f"for {time.time() - self.since:.0f} s"
        )
        return f"rank {self.rank}: update {self.update}, {self.doing} ({fate})"


ENDED = "ended"
WAITS = "waits for the other ranks"
SAVES, KEEPS = "saves a checkpoint", "keeps a capsule"  # on a disk that may be slow


class Watchdog:
    """One a rank. With one rank it does nothing.

    Args:
        folder: the run's.
        timeout_s: longest wait for the other ranks.
        asked_to_stop: whether a signal asked this process to end.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        ranks: int,
        *,
        timeout_s: float,
        asked_to_stop: Callable[[], bool],
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.folder = folder / "ranks"
        self.rank, self.ranks = rank, ranks
        self.timeout_s, self.patience_s = timeout_s, patience_s
        self.asked_to_stop = asked_to_stop
        self._now = (0, "starts", time.time(), time.monotonic())
        self._began = time.time()
        self._told = False  # whether this rank's collectives are in the folder
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Call it when the folder exists."""
        if self.ranks > 1:
            self._began = time.time()
            require_plain_folder(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def does(self, update: int, what: str) -> None:
        self._now = (update, what, time.time(), time.monotonic())

    def close(self) -> None:
        """This rank has ended in good order."""
        self.does(self._now[0], ENDED)
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._write()

    def waited_s(self) -> float:
        """Seconds that this rank has waited for the others.

        A clock that is set changes nothing.
        """
        _, doing, _, since = self._now
        return time.monotonic() - since if doing == WAITS else 0.0

    def positions(self) -> list[Position]:
        """Every rank's last word, in rank order.

        Those that cannot be read are left out.
        """
        found = []
        for rank in range(self.ranks):
            try:
                found.append(
                    Position(**json.loads(read_plain(self.folder / f"rank{rank}.json", 65_536)))
                )
            except (OSError, ValueError, TypeError):
                continue
        return found

    def lost(self, error: BaseException, wait_s: float = 3.0) -> str | None:
        """Explain a RuntimeError by ranks that are gone or a failed wait.

        The text says where all ranks were.

        None if, after `wait_s`, all are there and the error is not one of a collective.
        """
        until = time.monotonic() + wait_s
        while self.ranks > 1:
            positions = self.positions()
            if any(position.gone for position in positions):
                return self._message(positions)
            if time.monotonic() > until:
                reason = re.sub(r"^\[\S+\] ", "", str(error)).partition("\n")[0].partition(". ")[0]
                told = (
                    f"rank {self.rank} could not hear from the others ({reason}): it ends, "
                    "and nothing is saved. "
                )
                collective = self._now[1] == WAITS or any(
                    library in str(error).lower() for library in ("gloo", "nccl", "c10d")
                )
                if not collective:
                    return None
                stuck = self._stuck(positions, failed=True)
                return f"{told.rstrip()}{stuck} {self._where(positions)}"
            time.sleep(0.1)
        return None

    def _watch(self) -> None:
        gone_since: float | None = None
        at_disk = -math.inf  # when a rank was last seen there
        while not self._over.wait(TICK_S):
            self._write()
            positions = self.positions()
            if not self._told and asked(self.folder, self.ranks, self._began):
                self._told = True
                write_dump(self.folder, self.rank)
            others_gone = any(position.gone for position in positions)
            gone_since = (gone_since or time.monotonic()) if others_gone else None
            waited, now = self.waited_s(), time.monotonic()
            at_disk = now if _at_disk(positions) else at_disk
            if gone_since is not None and time.monotonic() - gone_since >= self.patience_s:
                self._end(self._message(positions))
            elif self.asked_to_stop() and min(waited, now - at_disk) >= self.patience_s:
                why = f"rank {self.rank} was asked to end, and the others do not answer."
                self._end_stuck(why, positions, waited)
            elif waited >= self.timeout_s:
                limit = "execution.collective_timeout_s"
                why = f"rank {self.rank} has waited {waited:.0f} s ({limit})."
                self._end_stuck(why, positions, waited)

    def _end(self, why: str) -> None:
        if not self._over.is_set():
            print(f"\n{why}", file=sys.stderr, flush=True)
            os._exit(1)  # the main thread is in a call that does not return

    def _end_stuck(self, why: str, positions: list[Position], waited: float) -> None:
        """End and name the collective, unless the wait ends meanwhile."""
        stuck = self._stuck(positions)
        if self.waited_s() >= waited:
            self._end(f"{why}{stuck} {self._where(positions)}")

    def _stuck(self, positions: list[Position], *, failed: bool = False) -> str:
        """Say which collective the ranks are stuck in.

        Their dumps stay in the folder.

        Args:
            failed: this rank's last collective was given up by the process group.
        """
        self._told = True
        updates = {position.rank: position.update for position in positions}
        began, ranks = self._began, self.ranks
        return stuck_in(self.folder, self.rank, ranks, began, updates, ANSWER_S, failed=failed)

    def _message(self, positions: list[Position]) -> str:
        gone = ", ".join(str(position.rank) for position in positions if position.gone)
        return (
            f"rank {gone} is gone: rank {self.rank} ends too, and nothing is saved. "
            f"{self._where(positions)}"
        )

    def _where(self, positions: list[Position]) -> str:
        return (
            "Last seen: "
            + "; ".join(map(str, positions))
            + ". Go on from the last checkpoint with --resume"
        )

    def _write(self) -> None:
        update, doing, since, _ = self._now
        told = Position(self.rank, socket.gethostname(), os.getpid(), update, doing, since)
        path = self.folder / f"rank{self.rank}.json"
        try:
            replace_file(path, json.dumps(vars(told)).encode(), durable=False)
        except OSError:
            return  # a full disk is not what ends a run


def _at_disk(positions: list[Position]) -> bool:
    """True if a living rank of this host saves.

    Waiting for it is not in vain.
    """
    here = socket.gethostname()
    return any(
        one.doing in (SAVES, KEEPS) and one.host == here and not one.gone for one in positions
    )


def _alive(pid: int) -> bool:
    """True if a process of this host runs.

    One that ended and waits for its parent to notice does not.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
    except OSError:
        return True
