"""Held-out loss over a run's evaluations; when it ends the run.

Every rank holds the same `HeldOut` and feeds it the same loss, so that all ranks stop alike.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

KINDS = {"best_nats": (float, int), "best_update": int, "update": int, "worse_in_a_row": int}


@dataclass(frozen=True)
class HeldOut:
    """The evaluations after update 1, as far as stopping early needs them.

    Attributes:
        best_nats: lowest held-out loss, in nats a token; None before the first finite one.
        best_update: updates done at `best_nats`.
        worse_in_a_row: evaluations since then.
        update: updates done at the newest evaluation.
    """

    best_nats: float | None = None
    best_update: int | None = None
    worse_in_a_row: int = 0
    update: int = 0

    def after(self, update: int, loss_nats: float) -> HeldOut:
        """Add an evaluation; the one before update 1 does not count."""
        if update == 0:
            return self
        if math.isfinite(loss_nats) and (self.best_nats is None or loss_nats < self.best_nats):
            return HeldOut(loss_nats, update, 0, update)
        return HeldOut(self.best_nats, self.best_update, self.worse_in_a_row + 1, update)

    def exhausted(self, patience: int | None) -> bool:
        """Whether the run ends early.

        Args:
            patience: of evaluation.patience; None: never.
        """
        return patience is not None and self.worse_in_a_row >= patience

    def early_end(self, update: int, patience: int) -> str:
        """Say why a run ends after `update`."""
        evaluations = "1 evaluation" if patience == 1 else f"{patience} evaluations in a row"
        if self.best_update is None:
            return f"ended early after update {update}: {evaluations} had no finite held-out loss"
        return (
            f"ended early after update {update}: {evaluations} (evaluation.patience) brought no "
            f"lower held-out loss than {self.best_nats:.4g} nats a token after update "
            f"{self.best_update}, whose checkpoint is the run's result"
        )

    def state(self) -> dict[str, Any]:
        """Plain JSON, for a checkpoint."""
        return asdict(self)


def heldout_from(state: Any) -> HeldOut:
    """Read `HeldOut.state()`.

    Raises ValueError naming a field that is missing, unknown or odd.
    """
    names = {field.name for field in fields(HeldOut)}
    if not isinstance(state, dict) or set(state) != names:
        raise ValueError(f"details.heldout is malformed: {state!r:.80}")
    for name, value in state.items():
        number = isinstance(value, KINDS[name]) and not isinstance(value, bool)
        sound = number and math.isfinite(value) and value >= 0
        if not sound and not (value is None and name.startswith("best")):
            raise ValueError(f"details.heldout is malformed: {name} is {value!r:.80}")
    return HeldOut(**state)
