"""Read config.yaml, plan.json and env.json of a run, checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from glassloop.disk.opening import read_plain
from glassloop.disk.plain_yaml import plain_yaml
from glassloop.record.checked import LARGEST, MOST_COUNT, is_shallow

USED_SETTINGS: dict[str, tuple[type, ...]] = {  # of a config, in reports and studies
    "seed": (int, type(None)),
    "execution.precision": (str, type(None)),
    "optimizer.max_grad_norm": (int, float, type(None)),
    "schedule.warmup_updates": (int, type(None)),
}
Record = dict[
    str, Any
]  # a line of a run's file; "inf", "-inf", "nan" stand for numbers that are not finite


def setting(config: Record | None, name: str, default: Any = None) -> Any:
    """config["section"]["field"] for "section.field"; `default` where it is not there."""
    value: Any = config or {}
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return default
        value = value[part]
    return value


def read_object(path: Path) -> Record | None:
    """Read the fields of a JSON file; None without a file.

    Raises ValueError naming the file.
    """
    if (data := _bytes(path)) is None:
        return None
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError(f"{path}: nested too deep; {DAMAGED}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); {DAMAGED}") from None
    if not isinstance(value, dict) or not is_shallow(value):
        raise ValueError(f"{path}: not a JSON object, or nested too deep; {DAMAGED}")
    return value


DAMAGED = "the file was damaged or edited: put back a copy"


def recorded_config(path: Path) -> Record | None:
    """config.yaml, with the fields that readers use checked; None without sections."""
    if (data := _bytes(path)) is None:
        return None
    try:
        value = plain_yaml(data.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable YAML ({error}); {DAMAGED}") from None
    if not isinstance(value, dict):
        return None
    for name, kinds in USED_SETTINGS.items():
        found = setting(value, name)
        if not isinstance(found, kinds):
            raise ValueError(
                f"{path}: {name} = {found!r:.80} is a {type(found).__name__}; {DAMAGED}"
            )
    return value


def recorded_environment(path: Path) -> Record | None:
    """env.json, with the fields that readers use checked."""
    env = read_object(path)
    found = env or {}
    gpus, git = found.get("gpus") or [], found.get("git") or {}
    sound = (
        isinstance(found.get("packages") or {}, dict)
        and isinstance(gpus, list)
        and all(isinstance(gpu, dict) and isinstance(gpu.get("name"), str) for gpu in gpus)
        and isinstance(git, dict)
        and isinstance(git.get("commit") or "", str)
    )
    if not sound:
        raise ValueError(f"{path}: packages, gpus or git are not as a run writes them; {DAMAGED}")
    return env


def recorded_plan(path: Path) -> Record | None:
    """plan.json, with the fields that readers use checked."""
    plan = read_object(path)
    by_update = (plan or {}).get("by_update") or {}
    columns = by_update if isinstance(by_update, dict) else {"by_update": by_update}
    for name, value in {"lr": (plan or {}).get("lr"), **columns}.items():
        numbers = value if isinstance(value, list) else [] if value is None else [None]
        if not all(isinstance(one, int | float) and abs(one) <= LARGEST for one in numbers):
            raise ValueError(f"{path}: {name} is not a list of numbers; {DAMAGED}")
    for name, most in (("ranks", 65_535), ("updates", MOST_COUNT)):
        value = (plan or {}).get(name, 0)
        if not isinstance(value, int) or not 0 <= value <= most:
            raise ValueError(f"{path}: {name} = {value!r:.80} is not a count; {DAMAGED}")
    if not isinstance((plan or {}).get("contract") or {}, dict):
        raise ValueError(f"{path}: contract has no fields; {DAMAGED}")
    return plan


def _bytes(path: Path) -> bytes | None:
    try:
        return read_plain(path)
    except FileNotFoundError:
        return None
