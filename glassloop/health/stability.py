"""Detectors: compare an update with the ones before, before the optimizer moves.

Plain float arithmetic, so that all ranks decide alike.

Spikes are judged on logarithms, against a line through the last `window_updates` sound whole
windows, with Student's t for a new value (so the size of the window counts), and only from
LEAST_ENTRIES on and after warmup. A tail of few rows may scatter more, and its norm lie higher, by
sqrt(rows_per_update / rows). What the defaults did, measured by benchmarks/detectors.py (results
beside it): 48 clean runs of 60 updates of a tiny Llama, 2,640 updates after warmup, 576 tails, 16
rows a window; then faults planted into their numbers.

| finding | told when | false alarms | seen |
| --- | --- | --- | --- |
| norm_spike | at least 2 x the forecast, chance < 1e-5 | 0 | norm x2 34 %, x3 92 %, x5 98 %, x10 and x50 all; tails alike |
| loss_spike | at least 1.5 x and 0.1 nats above, chance < 1e-5 | 0 | middle row of 16: x10 51 %, x20 90 %, x50 99 % |
| vanishing_gradient | norm / loss below 1 % of the run's highest, or at once below 10 % | 0 | 0: at once; a fall to 5 %: by the 4th |
| | (chance < 1e-5), 3 whole windows in a row; or exactly 0 | | update; x 0.8 an update: at the 24th |
| no_learning | the line through 40 losses does not fall, a fall of 5 % is ruled out by 3 | 1 run of 48 | flat within 60 updates: 34 % of |
| | standard errors, and they lie no lower than the run began | | runs (62 % where losses scatter by 3 %) |
| diverged | 1.5 x the higher of the first two losses, 5 whole windows in a row, warmup too | 0 | loss at 1.5 x 33 %, 2 x and 3 x all: |
| | | | at the fifth whole window |

That one run fell too little to tell from flat: losses scatter by 8 % there, and runs like it fall
by less than 2 % over 40 updates. On drawn series with normal scatter up to 20 % the spike detectors raised 2 false alarms in 198,000 updates; with
heavy tails (Student's t, 4 degrees) 163, about 1 in 1,200: `on_spike` = warn is the default for
that reason. Of 150 drawn series of 200 updates none was told to have diverged where losses scatter
by 20 % and never fall, 7 where they scatter by 30 %. A lightest row at x50 is seen in 83 %, since
it weighs little in the mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from glassloop.stats import Forecast, fit, forecast

Kind = Literal["norm_spike", "loss_spike", "vanishing_gradient", "no_learning", "diverged"]

# Of the window before anything is compared with it: a line through fewer forecasts a bend of the
# curve badly
LEAST_ENTRIES = 8
NORM_FACTOR = (
    2.0  # a norm below this many times the forecast is no spike, however narrow the window
)
LOSS_FACTOR = 1.5  # the same for the loss,
LOSS_NATS = 0.1  # which must also lie this far above the forecast: near 0 a factor means little
NEW_LEVEL_UPDATES = 5  # unusual updates in a row, applied all the same, that become the new window
VANISHED = (
    0.01  # of the highest level of norm / loss that the run has had: the gradient has vanished
)
FELL = 0.1  # of the forecast, and improbable: the gradient has vanished at once
VANISHING_UPDATES = 3  # in a row, for either
LEAST_LOSS_NATS = 1e-3  # below it the loss counts as 0 and the gradient may be 0 as well
START_UPDATES = 10  # the first updates, whose mean loss is what a run starts from
LEARNED_NATS = 0.1  # mean loss below which nothing is left to learn
BEGAN_UPDATES = 2  # the first of those, in which adapters are still small: what a run began with
DIVERGED = 1.5  # times the higher loss of them,
# Or times the lower one, where the second update has leapt already, and at least LOSS_NATS above
# it,
LEAPT = 2.0
DIVERGED_UPDATES = 5  # for so many whole updates in a row: training has diverged
LEAST_FALL = (
    0.05  # of the loss, over no_learning_updates: what a run that learns is expected to reach
)


@dataclass(frozen=True)
class Signals:
    """The numbers of an update that every rank knows before the step.

    All are finite: health.decision has checked that.
    """

    update: int
    lr: float
    rows: int  # of the window, over all ranks
    supervised_tokens: int  # N
    loss_nats: float  # global token mean
    grad_norm: float  # |g|, before clipping


@dataclass(frozen=True)
class Finding:
    """Something unusual about an update, in words and in numbers."""

    kind: Kind
    message: str
    details: dict[str, float | int] = field(default_factory=dict)


class Entry(NamedTuple):
    """A whole window that was taken in."""

    update: int
    log_norm: float
    log_loss: float


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
        self.above_in_a_row = (
            0  # whole updates up to now whose loss was above what the run began with
        )
        self.above_since: int | None = None  # the first of them
        self.losses: list[
            tuple[int, float]
        ] = []  # (update, loss_nats) since warmup, or since the last finding of no_learning

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
        """Sigma of a tail over that of a whole window.

        A tail is a mean over fewer rows.
        """
        return math.sqrt(max(1.0, self.rows_per_update / signals.rows))

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
        seen = forecast(
            [e.update for e in self.window],
            [e.log_norm for e in self.window],
            signals.update,
            log_norm,
            widen,
        )
        if log_norm - seen.expected < math.log(NORM_FACTOR) or seen.above > self.false_alarm_rate:
            return None
        return self._spike(
            "norm_spike", f"gradient norm {signals.grad_norm:.4g}", signals.grad_norm, signals, seen
        )

    def _loss_spike(self, signals: Signals) -> Finding | None:
        log_loss = entry_of(signals).log_loss
        widen = self._widen(signals)
        seen = forecast(
            [e.update for e in self.window],
            [e.log_loss for e in self.window],
            signals.update,
            log_loss,
            widen,
        )
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
        usual, chance = math.exp(seen.expected), seen.above
        tail = (
            f"; a tail of {signals.rows} of {self.rows_per_update} rows, allowed for"
            if signals.rows < self.rows_per_update
            else ""
        )
        message = (
            f"{what} is {value / usual:.3g} times the {usual:.4g} that the last "
            f"{len(self.window)} sound updates lead to expect: "
            f"t = {seen.t:.3g} where they scatter by {seen.sigma:.1%}, which a sound "
            f"update reaches with chance {chance:.1g}{tail}"
        )
        details = {
            "value": value,
            "expected": usual,
            "sigma_log": seen.sigma,
            "t": seen.t,
            "degrees": seen.degrees,
            "chance": chance,
        }
        return Finding(kind, message, {**details, "window_updates": len(self.window)})

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
        seen = forecast(
            [e.update for e in self.window], [ratio(e) for e in self.window], signals.update, value
        )
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
            message = (
                f"the gradient is exactly 0 and the loss {signals.loss_nats:.4g} nats a "
                "token: nothing reaches the adapters"
            )
            return Finding(
                "vanishing_gradient", message, {"value": 0.0, "loss_nats": signals.loss_nats}
            )
        if signals.rows < self.rows_per_update or self.low_in_a_row != VANISHING_UPDATES - 1:
            return None
        if not self._fell(signals) and not self._vanished(signals):
            return None
        usual = math.exp(self.highest) * max(signals.loss_nats, LEAST_LOSS_NATS)
        message = (
            f"gradient norm {signals.grad_norm:.4g} at a loss of {signals.loss_nats:.4g} "
            f"nats a token, {VANISHING_UPDATES} updates in a row "
            f"far below the {usual:.4g} that the run has had at its highest for such a loss"
        )
        return Finding(
            "vanishing_gradient",
            message,
            {"value": signals.grad_norm, "expected": usual, "loss_nats": signals.loss_nats},
        )

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
        began, since = self.start[0], self.above_since or signals.update
        message = (
            f"loss {signals.loss_nats:.4g} nats a token: since update {since}, "
            f"{DIVERGED_UPDATES} whole updates in a row, it has stood "
            f"far above the {began:.4g} that the run began with; training has diverged at "
            f"lr = {signals.lr:.3g}, and a lower optimizer.lr or a "
            "longer warmup is the cure"
        )
        return Finding(
            "diverged",
            message,
            {"value": signals.loss_nats, "start_nats": began, "lr": signals.lr, "since": since},
        )

    def _no_learning(self, signals: Signals) -> Finding | None:
        """A loss that is shown to be flat.

        Noise alone raises no alarm.
        """
        losses = self._losses_with(signals)
        if len(losses) < self.no_learning_updates or len(self.start) < START_UPDATES // 2:
            return None
        values = [loss for _, loss in losses]
        line = fit([update for update, _ in losses], values)
        updates = losses[-1][0] - losses[0][0]
        fall, error = -line.slope * updates, line.sigma / math.sqrt(line.spread) * updates
        newer = values[len(values) // 2 :]
        start = math.fsum(self.start) / len(self.start)
        since_start = start - math.fsum(newer) / len(newer)
        start_error = line.sigma * math.sqrt(1 / len(self.start) + 1 / len(newer))
        falls = (
            fall > 0 or fall + 3 * error > LEAST_FALL * line.mean_y or since_start > start_error / 2
        )
        if line.mean_y < LEARNED_NATS or falls:
            return None
        message = (
            f"the loss has not fallen over the {updates} updates to {signals.update}: by "
            f"{fall:.3g} +- {error:.2g} nats at a mean of "
            f"{line.mean_y:.4g}, and it began at {start:.4g}, while lr was above 0 (now "
            f"{signals.lr:.3g})"
        )
        numbers = {
            "fall_nats": fall,
            "error_nats": error,
            "mean_nats": line.mean_y,
            "start_nats": start,
            "updates": updates,
        }
        return Finding("no_learning", message, numbers)

    def _losses_with(self, signals: Signals) -> list[tuple[int, float]]:
        """The losses that no_learning compares, with this update's.

        It is left out if it is a tail or trains nothing.
        """
        if (
            signals.update <= self.warmup_updates
            or signals.lr <= 0
            or signals.rows < self.rows_per_update
        ):
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
            low, above, since = (
                int(state["low_in_a_row"]),
                int(state.get("above_in_a_row", 0)),
                state.get("above_since"),
            )
            since = int(since) if above and since is not None else None
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"detectors: the saved state is malformed ({error!r}); leave it out to "
                "start their windows anew"
            ) from None
        self.window, self.unusual = (
            window[-self.window_updates :],
            unusual[-NEW_LEVEL_UPDATES + 1 :],
        )
        self.losses = losses[-self.no_learning_updates :]
        self.start, self.highest, self.low_in_a_row = start, highest, low
        self.above_in_a_row, self.above_since = above if since else 0, since


def entry_of(signals: Signals) -> Entry:
    """An update with a gradient, as the windows hold it."""
    return Entry(
        signals.update,
        math.log(signals.grad_norm or 1.0),
        math.log(max(signals.loss_nats, LEAST_LOSS_NATS)),
    )


def ratio(entry: Entry) -> float:
    """log(norm / loss)."""
    return entry.log_norm - entry.log_loss


def level(window: Sequence[Entry]) -> float:
    """Mean of log(norm / loss)."""
    return math.fsum(map(ratio, window)) / len(window)


def _finite(value: Any) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError(f"{value!r} is not finite")
    return number
