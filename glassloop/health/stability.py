"""Detectors: compare an update with the ones before, before the optimizer moves.

Plain float arithmetic, so that all ranks decide alike. Spikes are judged on logarithms, against a
line through the last `window_updates` sound whole windows, with Student's t for a new value (so the
size of the window counts), and only from LEAST_ENTRIES on and after warmup. A tail of few rows may
scatter more, and its norm lie higher, by sqrt(rows_per_update / rows). What the defaults did,
measured by benchmarks/detectors.py: 48 clean runs of 60 updates of a tiny Llama, 2,640 updates
after warmup, 576 tails, 16 rows a window; then faults planted into their numbers.

    finding             false alarms  found when; how often planted faults were seen
    norm_spike          0             at least 2 x the forecast, chance < 1e-5
                                      x2 34 %, x3 92 %, x5 98 %, x10 and x50 all; tails alike
    loss_spike          0             at least 1.5 x and 0.1 nats above, chance < 1e-5
                                      middle row of 16: x10 51 %, x20 90 %, x50 99 %
    vanishing_gradient  0             norm / loss below 1 % of the run's highest, or at once below
                                      10 % (chance < 1e-5), 3 whole windows in a row; or exactly 0
                                      0: at once; to 5 %: 4th update; x 0.8 an update: the 24th
    no_learning         1 run of 48   the line through 40 losses does not fall, 3 standard errors
                                      rule out a fall of 5 %, and they lie no lower than at first
                                      flat within 60 updates: 34 % of runs (62 % at 3 % scatter)
    diverged            0             1.5 x the higher of the first two losses, 5 whole windows in
                                      a row, warmup too
                                      loss at 1.5 x 33 %, 2 x and 3 x all: at the fifth window

That one run fell too little to tell from flat: losses scatter by 8 % there, and runs like it fall
by less than 2 % over 40 updates. On drawn series with normal scatter up to 20 % the spike
detectors raised 2 false alarms in 198,000 updates; with heavy tails (Student's t, 4 degrees) 163,
about 1 in 1,200: so `on_spike` = warn is the default. Of 150 drawn series of 200 updates whose
losses never fall, none was reported as diverged at a scatter of 20 %, and 7 at 30 %. The lightest
row at x50 is seen in 83 %: it weighs little in the mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from glassloop.health.findings import diverged, no_gradient, not_learning, spike, vanished
from glassloop.health.signals import (
    LEAST_LOSS_NATS,
    Entry,
    Finding,
    Kind,
    Signals,
    entry_of,
    level,
    ratio,
)
from glassloop.stats import Forecast, forecast

LEAST_ENTRIES = 8  # of the window: a line through fewer forecasts a bend of the curve badly
NORM_FACTOR = 2.0  # a smaller multiple of the forecast is no spike, however narrow the window
LOSS_FACTOR = 1.5  # the same for the loss,
LOSS_NATS = 0.1  # which must also lie this far above the forecast: near 0 a factor means little
NEW_LEVEL_UPDATES = 5  # unusual updates in a row, applied all the same, that become the new window
VANISHED = 0.01  # of the run's highest level of norm / loss: the gradient has vanished
FELL = 0.1  # of the forecast, and improbable: the gradient has vanished at once
VANISHING_UPDATES = 3  # in a row, for either
START_UPDATES = 10  # the first updates, whose mean loss is what a run starts from
BEGAN_UPDATES = 2  # the first of those, in which adapters are still small: what a run began with
DIVERGED = 1.5  # times the higher loss of them,
LEAPT = 2.0  # or times the lower one, if the second has leapt, and LOSS_NATS above it,
DIVERGED_UPDATES = 5  # for so many whole updates in a row: training has diverged


class Detectors:
    """The windows that updates are compared with.

    `look` decides, `note` remembers; call both once an update, in this order.
    """

    def __init__(
        self,
        *,
        rows_per_update: int,
        warmup_updates: int,
        window_updates: int = 20,
        false_alarm_rate: float = 1e-5,
        no_learning_updates: int = 40,
    ) -> None:
        """Set empty windows; units are updates.

        Args:
            rows_per_update: rows of a whole window; at most the training rows, or every window
                would count as a tail.
            false_alarm_rate: chance that a sound update raises an alarm, for each detector.
        """
        self.rows_per_update = rows_per_update
        self.warmup_updates = warmup_updates
        self.window_updates = max(window_updates, LEAST_ENTRIES)
        self.false_alarm_rate = false_alarm_rate
        self.no_learning_updates = no_learning_updates
        self.window: list[Entry] = []
        self.unusual: list[Entry] = []  # in a row, up to now
        self.low_in_a_row = 0
        self.highest = -math.inf  # level of log(norm / loss) over a window
        self.start: list[float] = []  # loss_nats of the first updates
        self.above_in_a_row = 0  # whole updates up to now with a loss above the run's first ones
        self.above_since: int | None = None  # the first of them
        # (update, loss_nats) since warmup, or since the last finding of no_learning
        self.losses: list[tuple[int, float]] = []

    def look(self, signals: Signals) -> tuple[Finding, ...]:
        """Find unusual things about the update; change nothing."""
        found = [
            self._vanishing(signals),
            self._diverged(signals),
            *(self._spikes(signals) if signals.update > self.warmup_updates else ()),
        ]
        findings = tuple(finding for finding in found if finding is not None)
        learning = None if findings else self._no_learning(signals)
        return findings if learning is None else (learning,)

    def note(self, signals: Signals, findings: Sequence[Finding], applied: bool) -> None:
        """Add the update to the windows.

        Args:
            findings: those of `look`. applied: the optimizer moved.

        A tail is not taken in, since its norm and loss are noisier. Nor is an update that was left
        out, or one with a spike (told or, in warmup, not) or a sudden fall, unless
        NEW_LEVEL_UPDATES of them come in a row.
        """
        kinds = {finding.kind for finding in findings}
        if "no_learning" in kinds:
            self.losses = []
        if signals.grad_norm == 0:
            self.low_in_a_row = max(self.low_in_a_row + 1, VANISHING_UPDATES)
        if not applied or signals.grad_norm == 0 or signals.rows < self.rows_per_update:
            return
        if self._above(signals):
            self.above_in_a_row += 1
            self.above_since = self.above_since or signals.update
        else:
            self.above_in_a_row, self.above_since = 0, None
        fell, vanished = self._fell(signals), self._vanished(signals)
        self.low_in_a_row = self.low_in_a_row + 1 if fell or vanished else 0
        entry, unusual = entry_of(signals), fell or any(self._spikes(signals))
        if unusual:
            self.unusual.append(entry)
            if len(self.unusual) == NEW_LEVEL_UPDATES:
                self.window, self.unusual = self.unusual, []
        else:
            self.window, self.unusual = [*self.window, entry][-self.window_updates :], []
        if len(self.window) >= LEAST_ENTRIES:
            self.highest = max(self.highest, level(self.window))
        if not unusual and "no_learning" not in kinds:
            if signals.update <= START_UPDATES:
                self.start.append(signals.loss_nats)
            self.losses = self._losses_with(signals) or self.losses

    @property
    def usual_norm(self) -> float | None:
        """Geometric mean of the window's gradient norms.

        None while the window has too few entries.
        """
        if len(self.window) < LEAST_ENTRIES:
            return None
        return math.exp(math.fsum(entry.log_norm for entry in self.window) / len(self.window))

    def _widen(self, signals: Signals) -> float:
        """Ratio of a tail's sigma to a whole window's.

        A tail is a mean over fewer rows.
        """
        return math.sqrt(max(1.0, self.rows_per_update / signals.rows))

    def _forecast(
        self, values: list[float], signals: Signals, value: float, widen: float = 1.0
    ) -> Forecast:
        updates = [entry.update for entry in self.window]
        return forecast(updates, values, signals.update, value, widen)

    def _spikes(self, signals: Signals) -> tuple[Finding | None, ...]:
        return (
            (self._norm_spike(signals), self._loss_spike(signals))
            if len(self.window) >= LEAST_ENTRIES
            else ()
        )

    def _norm_spike(self, signals: Signals) -> Finding | None:
        if signals.grad_norm == 0:
            return None
        # Where noise makes up the gradient, its norm goes with 1 / sqrt(rows): that much a tail's
        # may lie higher.
        widen = self._widen(signals)
        log_norm = math.log(signals.grad_norm / widen)
        seen = self._forecast([entry.log_norm for entry in self.window], signals, log_norm, widen)
        if log_norm - seen.expected < math.log(NORM_FACTOR) or seen.above > self.false_alarm_rate:
            return None
        return self._spike(
            "norm_spike", f"gradient norm {signals.grad_norm:.4g}", signals.grad_norm, signals, seen
        )

    def _loss_spike(self, signals: Signals) -> Finding | None:
        log_loss, widen = entry_of(signals).log_loss, self._widen(signals)
        seen = self._forecast([entry.log_loss for entry in self.window], signals, log_loss, widen)
        small = (
            log_loss - seen.expected < math.log(LOSS_FACTOR)
            or signals.loss_nats - math.exp(seen.expected) < LOSS_NATS
        )
        if small or seen.above > self.false_alarm_rate:
            return None
        return self._spike(
            "loss_spike",
            f"loss {signals.loss_nats:.4g} nats a token",
            signals.loss_nats,
            signals,
            seen,
        )

    def _spike(
        self, kind: Kind, what: str, value: float, signals: Signals, seen: Forecast
    ) -> Finding:
        return spike(
            kind,
            what,
            value,
            signals,
            seen,
            window_updates=len(self.window),
            rows_per_update=self.rows_per_update,
        )

    def _fell(self, signals: Signals) -> bool:
        """Norm / loss lies improbably far below the window's forecast.

        Over the loss, since a run that has learned its rows has no gradient.
        """
        if (
            signals.grad_norm == 0
            or signals.update <= self.warmup_updates
            or len(self.window) < LEAST_ENTRIES
        ):
            return False
        value = ratio(entry_of(signals))
        seen = self._forecast([ratio(entry) for entry in self.window], signals, value)
        return value - seen.expected < math.log(FELL) and seen.below < self.false_alarm_rate

    def _vanished(self, signals: Signals) -> bool:
        """Norm / loss lies far below the highest level of the run.

        However slowly it came there.
        """
        after_warmup = signals.update > self.warmup_updates
        return (
            after_warmup
            and signals.grad_norm > 0
            and ratio(entry_of(signals)) < self.highest + math.log(VANISHED)
        )

    def _vanishing(self, signals: Signals) -> Finding | None:
        """A gradient that has vanished, found once, when it has lasted.

        A gradient of exactly 0 is found at once, in warmup too.
        """
        if signals.grad_norm == 0:
            if signals.loss_nats < LEAST_LOSS_NATS or self.low_in_a_row >= VANISHING_UPDATES:
                return None
            return no_gradient(signals)
        if signals.rows < self.rows_per_update or self.low_in_a_row != VANISHING_UPDATES - 1:
            return None
        if not self._fell(signals) and not self._vanished(signals):
            return None
        return vanished(signals, self.highest, VANISHING_UPDATES)

    def _above(self, signals: Signals) -> bool:
        """The loss lies far above the run's first ones.

        No window is needed: a rate that is too high does it before there is one.
        """
        if signals.rows < self.rows_per_update or len(self.start) < BEGAN_UPDATES:
            return False
        low, high = min(self.start[:BEGAN_UPDATES]), max(self.start[:BEGAN_UPDATES])
        return signals.loss_nats > max(min(DIVERGED * high, LEAPT * low), low + LOSS_NATS)

    def _diverged(self, signals: Signals) -> Finding | None:
        """Divergence, found once, when it has lasted.

        It is found again only after the loss has come down.
        """
        if self.above_in_a_row != DIVERGED_UPDATES - 1 or not self._above(signals):
            return None
        since = self.above_since or signals.update
        return diverged(signals, self.start[0], since, DIVERGED_UPDATES)

    def _no_learning(self, signals: Signals) -> Finding | None:
        """A loss that is shown to be flat.

        Noise alone raises no alarm.
        """
        losses = self._losses_with(signals)
        if len(losses) < self.no_learning_updates or len(self.start) < START_UPDATES // 2:
            return None
        return not_learning(signals, losses, self.start)

    def _losses_with(self, signals: Signals) -> list[tuple[int, float]]:
        """The losses that no_learning compares, with this update's.

        It is left out if it is a tail or trains nothing.
        """
        trains = signals.update > self.warmup_updates and signals.lr > 0
        if not trains or signals.rows < self.rows_per_update:
            return []
        return [*self.losses, (signals.update, signals.loss_nats)][-self.no_learning_updates :]

    def state(self) -> dict[str, Any]:
        """Plain JSON, for a checkpoint."""
        return {
            "window": [list(entry) for entry in self.window],
            "unusual": [list(entry) for entry in self.unusual],
            "low_in_a_row": self.low_in_a_row,
            "highest": self.highest if math.isfinite(self.highest) else None,
            "start": list(self.start),
            "above_in_a_row": self.above_in_a_row,
            "above_since": self.above_since,
            "losses": [list(pair) for pair in self.losses],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore `state()`. Raises ValueError, and changes nothing, if it is malformed."""
        try:
            window = [Entry(int(u), _finite(n), _finite(loss)) for u, n, loss in state["window"]]
            unusual = [Entry(int(u), _finite(n), _finite(loss)) for u, n, loss in state["unusual"]]
            losses = [(int(update), _finite(loss)) for update, loss in state["losses"]]
            start = [_finite(loss) for loss in state["start"]]
            highest = -math.inf if state["highest"] is None else _finite(state["highest"])
            low, above = int(state["low_in_a_row"]), int(state.get("above_in_a_row", 0))
            since = state.get("above_since")
            since = int(since) if above and since is not None else None
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"detectors: the saved state is malformed ({error!r}); leave it out to "
                "start their windows anew"
            ) from None
        self.window = window[-self.window_updates :]
        self.unusual = unusual[-NEW_LEVEL_UPDATES + 1 :]
        self.losses = losses[-self.no_learning_updates :]
        self.start, self.highest, self.low_in_a_row = start, highest, low
        self.above_in_a_row, self.above_since = above if since else 0, since


def _finite(value: Any) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError(f"{value!r} is not finite")
    return number
