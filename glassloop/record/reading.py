"""What a run's folder says of its updates, read back: the records of one trajectory, rows and passes, the config. Nothing here imports torch.

A resumed run does some updates again, under a higher attempt. The updates that led to one of them are, for each number, those of the highest
attempt that is not above its own: attempts grow from start to start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from glassloop.config.arguments import from_values, with_old_engine
from glassloop.config.config import Config
from glassloop.record.observers import METRICS, ROWS, read_jsonl

Record = dict[str, Any]  # one line of metrics.jsonl
WINDOW_UPDATES = 20  # applied updates whose medians are the usual loss and norm


def is_run(folder: Path) -> bool:
    return (folder / METRICS).is_file() and (folder / "config.yaml").is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """The config that the run was started with, as plain values. Raises ValueError where config.yaml cannot be read."""
    path = folder / "config.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): name the folder of a run, or of one of its capsules"
        ) from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} holds no sections: name the folder of a run, or of one of its capsules"
        )
    return values


def with_overrides(values: Mapping[str, Any], overrides: Mapping[str, str]) -> Config:
    """The recorded config with fields replaced ("model.id" -> text of its value), and free of what only says how a start goes on."""
    plain: dict[str, Any] = {
        section: dict(v) if isinstance(v, dict) else v for section, v in values.items()
    }
    plain.pop("resume", None)
    plain["tracking"] = {}
    for name, value in overrides.items():
        section, _, field = name.partition(".")
        plain.setdefault(section, {})[field] = None if value == "null" else value
    return from_values(with_old_engine(plain))


def trajectory(folder: Path, update: int) -> dict[int, Record]:
    """The records of update 1 .. `update` that led to its highest attempt, by number; those that are missing are left out.

    Raises:
        ValueError: `update` is not on record.
    """
    by_update: dict[int, dict[int, Record]] = {}
    for record in read_jsonl(folder / METRICS):
        by_update.setdefault(record["update"], {})[record["attempt"]] = record
    if update not in by_update:
        known = f"1 .. {max(by_update)}" if by_update else "none yet"
        raise ValueError(
            f"--update {update} is not on record in {folder / METRICS}: it has {known}"
        )
    chain: dict[int, Record] = {}
    attempt = max(by_update[update])
    for u in range(update, 0, -1):
        if not (fitting := [a for a in by_update.get(u, {}) if a <= attempt]):
            continue
        attempt = max(fitting)
        chain[u] = by_update[u][attempt]
    return dict(sorted(chain.items()))


def row_records(folder: Path) -> dict[tuple[int, int], list[Record]]:
    """Lines of rows.jsonl by (update, attempt), in the order of ranks and passes; empty under record.text = none."""
    path = folder / ROWS
    rows: dict[tuple[int, int], list[Record]] = {}
    for record in read_jsonl(path) if path.exists() else ():
        rows.setdefault((record["update"], record["attempt"]), []).append(record)
    return rows


def number_of(value: Any) -> float | None:
    """A recorded number; None stays None, "nan" and "inf" become numbers."""
    return None if value is None else float(value)


def usual(chain: Mapping[int, Record], update: int) -> tuple[float, float] | None:
    """Median loss (nats a token) and gradient norm of the last applied updates before `update`; None where fewer than 3 are on record."""
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
