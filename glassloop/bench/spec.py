"""The work of a benchmark arm, as values in a JSON file.

No torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1  # of a line of results; raised when a field changes its meaning
# What comparable lines share.
SAME = ("workload", "rows_per_update", "precision", "checkpointing", "model", "r", "rows_digest")


@dataclass(frozen=True)
class Spec:
    """One arm.

    Attributes:
        engine: execution.engine. workload: a name of workloads.py. model: model.id. layout,
            precision, checkpointing: execution.*.
        ranks: processes, over which the rows of an update are shared. batch: rows of a micro-batch.
            rows_per_update: over all ranks.
        updates: measured ones, after `warmup` that are not. repeat: which time this arm is
            measured. r: rank of the adapters.
        turns: how often that is done, while other arms are loaded and wait; 0: once, with nobody
            beside it.
        device: cuda | cpu. overrides: further section.field=value of the config, the same in all
            arms that are compared.
        varied: execution.field=value or memory.field=value that tells this arm from others on the
            same work; the reference has none.
        profile: the update that is profiled instead of any being measured; 0: none. profile_dir:
            folder for what comes of it.
        launched_at: seconds since 1970 at which the process was started; 0: when its interpreter
            reached us.
        out: file that gets the result's line. check_only: others are held to it, and no table shows
            its speed.
    """

    engine: str
    workload: str
    layout: str
    ranks: int
    batch: int
    rows_per_update: int
    model: str = "random:llama-8b"
    precision: str = "bf16"
    checkpointing: bool = True
    r: int = 16
    updates: int = 5
    warmup: int = 2
    turns: int = 0
    repeat: int = 0
    device: str = "cuda"
    backend: str = "auto"
    overrides: tuple[str, ...] = ()
    varied: tuple[str, ...] = ()
    profile: int = 0
    profile_dir: str = ""
    launched_at: float = 0.0
    out: str = ""
    check_only: bool = False

    def __post_init__(self) -> None:
        if self.warmup < 1 or self.updates < 1:
            raise ValueError(
                f"updates = {self.updates}, warmup = {self.warmup}: at least one of each (update 1 "
                "is never measured)"
            )

    @property
    def updates_per_turn(self) -> int:
        return self.warmup + self.updates

    @property
    def total_updates(self) -> int:
        """Sum over all turns, warm-up included."""
        return max(1, self.turns) * self.updates_per_turn

    @property
    def measured_updates(self) -> list[int]:
        """Their numbers, from 1 on."""
        return [
            u
            for u in range(1, self.total_updates + 1)
            if (u - 1) % self.updates_per_turn >= self.warmup
        ]

    @property
    def name(self) -> str:
        """Name of the arm in a table."""
        parts = [
            self.engine,
            self.workload,
            self.layout,
            f"{self.batch} rows",
            f"{self.ranks} rank{'s' * (self.ranks > 1)}",
        ]
        varied = (text.removeprefix("execution.") for text in self.varied)
        return ", ".join([*parts, "recomputed" if self.checkpointing else "stored", *varied])

    @property
    def cell(self) -> dict[str, Any]:
        """Fields that tell the arm from others; the arm adds `rows_digest`."""
        values = asdict(self)
        for name in (
            "updates",
            "warmup",
            "turns",
            "repeat",
            "device",
            "backend",
            "launched_at",
            "out",
            "check_only",
            "profile",
            "profile_dir",
        ):
            del values[name]
        return {**values, "overrides": list(self.overrides), "varied": list(self.varied)}

    @property
    def about(self) -> dict[str, Any]:
        """Beginning of its line, whether it is measured or not."""
        own = {
            "name": self.name,
            "repeat": self.repeat,
            "check_only": self.check_only,
            "cell": self.cell,
        }
        return {"schema": SCHEMA, "kind": "bench", **own}

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


def read_spec(path: Path) -> Spec:
    """Read a spec that `write` wrote.

    Raises:
        ValueError: it has unknown fields.
    """
    values = json.loads(path.read_text(encoding="utf-8"))
    try:
        return Spec(
            **{**values, **{name: tuple(values.get(name, ())) for name in ("overrides", "varied")}}
        )
    except TypeError as error:
        raise ValueError(f"{path} is no spec of an arm: {error}") from None
