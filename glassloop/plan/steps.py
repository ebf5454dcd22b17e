"""Step arithmetic: windows, updates, epochs, learning rates.

All of it is known before a run begins. Imports nothing heavy.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

SCHEMA = 1


def lr_at(update: int, *, updates: int, warmup: int, peak: float, kind: str, first: str) -> float:
    """Learning rate of update u = 1 .. U.

    linear:   peak * min(u / W, (U - u + 1) / (U - W + 1)), so that lr(W) = peak and lr(U) > 0.
    cosine:   after warmup, peak * (1 + cos(pi * (u - W) / (U - W + 1))) / 2. constant: peak after
    warmup. With first = "zero" each update has the value of the one before, and update 1 has 0, as
    transformers' Trainer has it: peak * min((u - 1) / W, (U - u + 1) / (U - W)).
    """
    if not 1 <= update <= updates:
        raise ValueError(f"update {update} is not one of 1 .. {updates}")
    u, total = (update, updates) if first == "peak_over_warmup" else (update - 1, updates - 1)
    if u < warmup:
        return peak * u / warmup
    done = u - warmup  # updates since the peak
    span = total - warmup + 1
    if kind == "linear":
        return peak * (span - done) / span
    if kind == "cosine":
        return peak * (1 + math.cos(math.pi * done / span)) / 2
    return peak


@dataclass(frozen=True)
class StepPlan:
    """Windows and updates of a run."""

    rows: int  # training rows of an epoch
    size: int  # rows of a micro-batch
    ranks: int
    accumulation: int  # micro-batches a rank takes in an update
    full_windows: int  # windows of rows_per_update rows in an epoch
    tail_rows: int  # rows left after the full windows; 0 where they divide
    tail: str  # "keep": the rest is a smaller update; "drop": it is left out
    updates: int
    lr: tuple[float, ...]  # lr[u - 1] is the learning rate of update u
    warmup: int = 0  # updates over which it rises

    @property
    def rows_per_update(self) -> int:
        return self.size * self.ranks * self.accumulation

    @property
    def windows_per_epoch(self) -> int:
        return self.full_windows + (1 if self.tail_rows and self.tail == "keep" else 0)

    @property
    def epochs(self) -> float:
        """Epochs that the updates make: updates over windows of an epoch."""
        return self.updates / self.windows_per_epoch

    @property
    def rows_trained(self) -> int:
        """Rows of all updates, counted as often as trained."""
        epochs, windows = divmod(self.updates, self.windows_per_epoch)
        of_an_epoch = self.rows - (self.tail_rows if self.tail == "drop" else 0)
        return (
            epochs * of_an_epoch + windows * self.rows_per_update
        )  # only an epoch's last window can be a tail

    @property
    def times_trained(self) -> dict[int, int] | None:
        """Map a number of times to the rows trained so often.

        None if tails are dropped: which rows those are differs by epoch.
        """
        if self.tail_rows and self.tail == "drop":
            return None
        epochs, windows = divmod(self.updates, self.windows_per_epoch)
        once_more = windows * self.rows_per_update
        counts = {epochs: self.rows - once_more, epochs + 1: once_more}
        return {times: rows for times, rows in counts.items() if rows}

    def as_dict(self) -> dict[str, Any]:
        """Plain values for plan.json."""
        derived = {
            "rows_per_update": self.rows_per_update,
            "windows_per_epoch": self.windows_per_epoch,
            "epochs": self.epochs,
        }
        return {"schema": SCHEMA, **asdict(self), **derived}


def warmup_of(updates: int, given: int | None, share: float) -> int:
    """Warmup updates: as given, or a share of the run, rounded up."""
    return math.ceil(round(share * updates, 9)) if given is None else given


def make_plan(
    *,
    rows: int,
    size: int,
    ranks: int,
    accumulation: int,
    tail: str,
    updates: int | None,
    epochs: float,
    warmup: int | None,
    peak: float,
    kind: str,
    first: str,
    warmup_share: float = 0.0,
) -> StepPlan:
    """Count windows and updates.

    A warmup of None is `warmup_share` of the updates, rounded up. Raises ValueError if the rows
    make no window, or if a given warmup is longer than the run.
    """
    per_update = size * ranks * accumulation
    full, left = divmod(rows, per_update)
    windows = full + (1 if left and tail == "keep" else 0)
    if windows == 0:
        raise ValueError(
            f"{rows} training rows make no window of {per_update} rows (batch.size {size} x "
            f"{ranks} ranks x accumulation "
            f"{accumulation}), and batch.tail = drop leaves the rest out: take more rows, a "
            "smaller batch, or batch.tail=keep"
        )
    if updates is None:
        updates = max(1, math.ceil(round(epochs * windows, 9)))
    warmup = warmup_of(updates, warmup, warmup_share)
    if warmup > updates:
        raise ValueError(
            f"schedule.warmup_updates = {warmup} is more than the {updates} updates of the run: "
            "the peak would never be reached. Lower schedule.warmup_updates, or set it to null."
        )
    lr = tuple(
        lr_at(u, updates=updates, warmup=warmup, peak=peak, kind=kind, first=first)
        for u in range(1, updates + 1)
    )
    return StepPlan(rows, size, ranks, accumulation, full, left, tail, updates, lr, warmup)


def counted(number: int, what: str) -> str:
    """A number with its noun: 1 rank, 2 ranks, 3 passes."""
    ending = "" if number == 1 else "es" if what.endswith(("s", "ch")) else "s"
    return f"{number:,} {what}{ending}"


def describe(plan: StepPlan) -> list[str]:
    """The step math in sentences, for the header of a run."""
    tail_rows, full = counted(plan.tail_rows, "row"), counted(plan.full_windows, "full window")
    tail = {
        "keep": f"{full} and one of {tail_rows}",
        "drop": f"{full}; {tail_rows} of each epoch are left out",
    }[plan.tail]
    updates, peak = counted(plan.updates, "update"), max(plan.lr)
    return [
        f"{counted(plan.size, 'row')} x {counted(plan.ranks, 'rank')} x "
        f"{counted(plan.accumulation, 'micro-batch')} = "
        f"{counted(plan.rows_per_update, 'row')} an update",
        f"{counted(plan.rows, 'row')} make {counted(plan.windows_per_epoch, 'update')} an epoch "
        f"({tail if plan.tail_rows else full})",
        f"{updates} {'is' if plan.updates == 1 else 'are'} {plan.epochs:.2f} epochs; "
        f"lr {plan.lr[0]:.3g} at update 1, {peak:.3g} at its peak, {plan.lr[-1]:.3g} at update "
        f"{plan.updates}",
    ]
