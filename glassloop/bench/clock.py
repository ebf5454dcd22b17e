"""Clock of an arm's updates: turns, seconds, joules, the card's state.

Arms that take turns are all loaded, and one at a time computes. `processes.run_together` gives the
turns, through files in the arm's folder: `ready-K` says that the arm waits for turn K (and has
freed what it can of the GPU's memory), `go-K` that the turn is its own. No torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glassloop.bench.machine import Sampler, card_state, energy_j, summed_up
from glassloop.bench.spec import Spec

POLL_S = 0.005
LONGEST_WAIT_S = 3600.0  # for a turn: whoever gives them is gone


def ready(folder: Path, turn: int) -> Path:
    """File that says: the arm in `folder` waits for this turn."""
    return folder / f"ready-{turn}"


def go(folder: Path, turn: int) -> Path:
    """File that says: the turn is this arm's."""
    return folder / f"go-{turn}"


class Clock:
    """Clock of every update of an arm, on every rank.

    Attributes:
        seconds: wall time of every update, the device's work included.
        turns_s: wall time of the measured updates, turn by turn; an arm that takes no turns has
            one.
        joules: what the card used for them; None if it does not say.
        started: seconds since 1970 when update 1 could begin. first_ended: when it was done.
        before: the card after update 1 (asking takes a while, which is not the first update's);
            None without a card.
    """

    def __init__(
        self,
        spec: Spec,
        folder: Path,
        *,
        uuid: str | None,
        first_rank: bool,
        wait: Callable[[], object],
        rest: Callable[[], object],
        wake: Callable[[], object] = lambda: None,
    ):
        """`uuid`: of the rank's card.

        `wait`: until the device is done. `rest`, `wake`: after a turn that is not the last, and
        before the next.
        """
        self.spec, self.folder, self.uuid, self.first_rank = spec, folder, uuid, first_rank
        self.wait, self.rest, self.wake = wait, rest, wake
        self.seconds: list[float] = []
        self.turns_s: list[float] = []
        self.joules: float | None = 0.0
        self.before: dict[str, Any] | None = None
        self.started = time.time()
        self.first_ended = 0.0
        self._samples: list[str] = []
        self._sampler: Sampler | None = None
        self._update_began = self._measuring_began = 0.0
        self._joules_before: float | None = None

    def begin(self, u: int) -> None:
        """Before update u. Raises TimeoutError where a turn does not come."""
        turn, place = divmod(u - 1, self.spec.updates_per_turn)
        if place == 0 and self.spec.turns:
            self._await(turn)
        self.wait()
        if place == self.spec.warmup:
            self._joules_before, self._measuring_began = energy_j(self.uuid), time.perf_counter()
        self._update_began = time.perf_counter()

    def end(self, u: int) -> None:
        """After update u."""
        self.wait()
        now = time.perf_counter()
        self.seconds.append(now - self._update_began)
        turn, place = divmod(u - 1, self.spec.updates_per_turn)
        if u == 1:
            self.first_ended = time.time()
            if self.first_rank and self.uuid:
                self.before = card_state(self.uuid)
        if place == 0 and self.first_rank and self.uuid:
            self._sampler = Sampler(self.uuid)
        if place == self.spec.updates_per_turn - 1:
            self._end_turn(turn, now)

    def _await(self, turn: int) -> None:
        if self.first_rank:
            ready(self.folder, turn).touch()
        until = time.monotonic() + LONGEST_WAIT_S
        while not go(self.folder, turn).exists():
            if time.monotonic() > until:
                raise TimeoutError(f"turn {turn} did not come within {LONGEST_WAIT_S:.0f} s")
            time.sleep(POLL_S)
        if turn == 0:
            self.started = time.time()
        else:
            self.wake()

    def _end_turn(self, turn: int, now: float) -> None:
        self.turns_s.append(now - self._measuring_began)
        after = energy_j(self.uuid)
        if self.joules is None or after is None or self._joules_before is None:
            self.joules = None
        else:
            self.joules += after - self._joules_before
        if self._sampler is not None:
            self._samples += self._sampler.stop()
            self._sampler = None
        if turn + 1 < self.spec.turns:
            self.rest()

    @property
    def measured_s(self) -> float:
        """Sum over all turns."""
        return sum(self.turns_s)

    @property
    def measured_update_s(self) -> list[float]:
        """Those of `seconds` that are measured."""
        return [self.seconds[u - 1] for u in self.spec.measured_updates]

    @property
    def warmup_update_s(self) -> list[float]:
        """The others."""
        measured = set(self.spec.measured_updates)
        return [seconds for u, seconds in enumerate(self.seconds, start=1) if u not in measured]

    @property
    def during(self) -> dict[str, Any] | None:
        """The card while updates were measured."""
        return summed_up(self._samples)
