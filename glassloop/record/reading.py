"""Read a run's folder as plain values; write nothing.

A resumed run does some updates again, under a higher attempt: attempts grow from start to start.
Two rules say which of several records of an update is meant:

    standing    the one that counts now: a record replaces all earlier ones of its update and of
                later updates, so a course that was left when the run went back is gone
    leading_to  the one that led to an update's highest attempt: of each earlier update the
                highest attempt that is not above the one that came after it
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from glassloop.config import Config
from glassloop.config.arguments import from_values, with_old_engine
from glassloop.config.trust import FIELDS, Words, unasked
from glassloop.record.jsonl import (
    EVALUATIONS,
    EVENTS,
    MACHINE,
    METRICS,
    PROBES,
    ROWS,
    SAMPLES,
    read_records,
)
from glassloop.record.run_files import (
    Record,
    recorded_config,
    recorded_environment,
    recorded_plan,
    setting,
)

WINDOW_UPDATES = 20  # applied updates whose medians are the usual loss and norm
ENDS = ("finished", "failed", "stopped")


@dataclass(frozen=True)
class RunData:
    """The contents of a run's folder, without repeated updates.

    Attributes:
        updates: UpdateRecords in order of their update. Of an update that was done again the last
            attempt, and none from a course that was left when the run went back.
        replaced: the UpdateRecords that do not count any more, in the order in which they were
            written.
        probes, machine, rows: of `updates` only; rows in the order in which they were written.
        evaluations: the last of each update.
        events: all, in the order in which they were written.
        plan, env, config: None if the file is missing.
    """

    folder: Path
    updates: list[Record]
    replaced: list[Record]
    probes: list[Record]
    machine: list[Record]
    rows: list[Record]
    evaluations: list[Record]
    samples: list[Record]
    events: list[Record]
    plan: Record | None
    env: Record | None
    config: Record | None

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def ranks(self) -> int:
        """Ranks of the newest update; the plan's before the first."""
        if self.updates:
            return len(self.updates[-1]["rank_loss_nats"])
        return int((self.plan or {}).get("ranks", 1))

    @property
    def planned_updates(self) -> int:
        """Updates of the whole run; 0 if unknown."""
        if self.updates:
            return int(self.updates[-1]["updates"])
        return int((self.plan or {}).get("updates", 0))

    @property
    def end(self) -> Record | None:
        return end_of(self.events)

    @property
    def ended_early(self) -> bool:
        """Whether evaluation.patience ended the run before its last update."""
        return self.end is not None and bool(self.end["details"].get("early"))

    @property
    def best_evaluation(self) -> Record | None:
        """The evaluation with the lowest held-out loss after update 1.

        Of equals the first; None without a finite one.
        """
        known = [
            one
            for one in self.evaluations
            if one["update"] and math.isfinite(float(one["loss_nats"]))
        ]
        return min(known, key=lambda one: float(one["loss_nats"]), default=None)

    @property
    def text(self) -> str:
        """record.text of the run."""
        return str(setting(self.config, "record.text", "ids"))


def end_of(events: Sequence[Record]) -> Record | None:
    """Return the event that ended a run.

    None while it runs, or if it was broken off without an event.
    """
    for event in reversed(events):
        if event["kind"] in ENDS:
            return event
        if event["kind"] in ("started", "resumed"):
            return None
    return None


def read_run(folder: Path) -> RunData:
    """Read everything that the reports show.

    Raises ValueError where the folder holds no run, or a file of it is damaged, a link, or newer
    than this glassloop.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"RUN = {folder} is no folder: name a run's folder (runs/NAME)")
    if not any(
        os.path.lexists(folder / name) for name in (METRICS, EVENTS, "config.yaml", "plan.json")
    ):
        raise ValueError(
            f"RUN = {folder} holds no run (no {METRICS}, no config.yaml): "
            "name a run's folder (runs/NAME)"
        )
    updates, replaced = standing(read_records(folder / METRICS))
    attempts = {record["update"]: record["attempt"] for record in updates}

    def counted(name: str) -> list[Record]:
        return [
            record
            for record in read_records(folder / name)
            if attempts.get(record["update"]) == record["attempt"]
        ]

    return RunData(
        folder=folder,
        updates=updates,
        replaced=replaced,
        probes=standing(counted(PROBES))[0],
        machine=standing(counted(MACHINE))[0],
        rows=counted(ROWS),
        evaluations=standing(read_records(folder / EVALUATIONS))[0],
        samples=read_records(folder / SAMPLES),
        events=read_records(folder / EVENTS),
        plan=recorded_plan(folder / "plan.json"),
        env=recorded_environment(folder / "env.json"),
        config=recorded_config(folder / "config.yaml"),
    )


def standing(records: list[Record]) -> tuple[list[Record], list[Record]]:
    """Split records into (current, replaced).

    A record replaces all earlier ones of its update and of later updates.
    """
    kept: list[Record] = []
    replaced: list[Record] = []
    for record in records:
        while kept and kept[-1]["update"] >= record["update"]:
            replaced.append(kept.pop())
        kept.append(record)
    return kept, replaced


def leading_to(records: Iterable[Record], update: int) -> dict[int, Record]:
    """Return the records that led to `update`, by number.

    They lead to its highest attempt.

    Updates that are not on record are left out; {} where `update` itself is not.
    """
    by_update: dict[int, dict[int, Record]] = {}
    for record in records:
        by_update.setdefault(record["update"], {})[record["attempt"]] = record
    chain: dict[int, Record] = {}
    attempt = max(by_update.get(update, {0: {}}))
    for u in sorted((u for u in by_update if 1 <= u <= update), reverse=True):
        if fitting := [a for a in by_update[u] if a <= attempt]:
            attempt = max(fitting)
            chain[u] = by_update[u][attempt]
    return dict(sorted(chain.items()))


def trajectory(folder: Path, update: int) -> dict[int, Record]:
    """Return `leading_to` of a run's metrics.

    Raises ValueError if `update` is not on record.
    """
    records = read_records(folder / METRICS)
    chain = leading_to(records, update)
    if update not in chain:
        last = max((record["update"] for record in records), default=None)
        known = "none yet" if last is None else f"1 .. {last}"
        raise ValueError(
            f"--update {update} is not on record in {folder / METRICS}: it has {known}"
        )
    return chain


def row_records(folder: Path) -> dict[tuple[int, int], list[Record]]:
    """Group rows.jsonl by (update, attempt).

    Rows are in the order of ranks and passes. Empty under record.text = none.
    """
    rows: dict[tuple[int, int], list[Record]] = {}
    for record in read_records(folder / ROWS):
        rows.setdefault((record["update"], record["attempt"]), []).append(record)
    return rows


def usual(chain: Mapping[int, Record], update: int) -> tuple[float, float] | None:
    """Return the usual loss and gradient norm before `update`.

    They are medians of the last applied updates, in nats a token; None if fewer than 3 are on
    record.
    """
    applied = [r for u, r in chain.items() if u < update and r["action"] == "applied"][
        -WINDOW_UPDATES:
    ]
    pairs = [
        (float(r["loss_nats"]), float(r["grad_norm_pre_clip"]))
        for r in applied
        if r["grad_norm_pre_clip"] is not None
    ]
    pairs = [(loss, norm) for loss, norm in pairs if math.isfinite(loss) and math.isfinite(norm)]
    if len(pairs) < 3:
        return None
    return median(loss for loss, _ in pairs), median(norm for _, norm in pairs)


def is_run(folder: Path) -> bool:
    return (folder / METRICS).is_file() and (folder / "config.yaml").is_file()


def read_config(folder: Path, name: str = "config.yaml") -> dict[str, Any]:
    """Return the recorded config as plain values.

    Raises ValueError if it cannot be read.
    """
    path = folder / name
    values = recorded_config(path)
    if values is None:
        raise ValueError(
            f"{path} is missing or holds no sections: name the folder of a run, "
            "or of one of its capsules"
        )
    return values


def file_of(folder: Path, record: Record, name: str) -> str:
    """Name the file that holds what an update ran under.

    A start that rewrites config.yaml or plan.json keeps the one before as config_000020.yaml, and
    names it in an event of the kind "changed".

    Args:
        record: the update's. name: "config.yaml" or "plan.json".
    """
    stem, _, end = name.partition(".")
    kept_name = re.compile(rf"{stem}_\d{{6,}}(_\d+)?\.{end}")
    place = (record["attempt"], record["update"])
    for event in read_records(folder / EVENTS):
        if event["kind"] != "changed" or place > (event["attempt"], event["update"]):
            continue
        kept = event["details"].get("kept")
        for one in kept if isinstance(kept, list) else ():
            if isinstance(one, str) and kept_name.fullmatch(one):
                return one
    return name


def with_overrides(
    values: Mapping[str, Any], overrides: Mapping[str, str], words: Words = FIELDS
) -> Config:
    """Build the recorded config with fields replaced, without resume and tracking.

    Args:
        overrides: "model.id" -> text of its value, from today's command line.
        words: how the command at hand writes what only a command line may ask for.

    Raises:
        ValueError: the record asks for what only a command line may ask for (config/trust.py).
    """
    plain: dict[str, Any] = {
        section: dict(v) if isinstance(v, dict) else v for section, v in values.items()
    }
    plain.pop("resume", None)
    plain["tracking"] = {}
    for name, value in overrides.items():
        section, _, field = name.partition(".")
        plain.setdefault(section, {})[field] = None if value == "null" else value
    config = from_values(with_old_engine(plain))
    if (why := unasked(config, overrides, "the run's own config", words)) is not None:
        raise ValueError(why)
    return config


def number(value: Any) -> float | None:
    """Convert a recorded number to a float; None stays None.

    The strings "nan", "inf" and "-inf" are numbers too.
    """
    return None if value is None else float(value)


def flat(config: Record | None, prefix: str = "") -> dict[str, Any]:
    """{"section.field": value} of a config, in its order."""
    found: dict[str, Any] = {}
    for name, value in (config or {}).items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
