"""The files of a resumed run: settings, plan and machine that changed."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glassloop.config import Config, ResumeConfig
from glassloop.config.arguments import from_values, to_yaml, with_old_engine
from glassloop.disk.opening import read_plain
from glassloop.disk.publish import replace_file, write_json, write_text
from glassloop.loop.run import Run
from glassloop.record.printable import printable
from glassloop.record.reading import read_config
from glassloop.saved.changes import Notice, computes, config_changes, settings_changed

NAMED_OF_PLAN = ("processes", "devices", "collectives")  # no field of the config explains them


def recorded_config(folder: Path) -> Config:
    """The config that a run's last start left in its config.yaml."""
    return from_values(with_old_engine(read_config(folder) | {"resume": {}}))


def record_resume(
    run: Run, recorded: Config, old_plan: Mapping[str, Any], start: Mapping[str, Any]
) -> None:
    """Rewrite a resumed run's settings, plan and machine. For rank 0.

    The files of the earlier start stay as config_000020.yaml, plan_000020.json and env_000020.json.
    The header and an event name every field that differs, with both values.

    Args:
        recorded: the config of the earlier start. old_plan: its plan.json. start: this env.json.
    """
    assert run.contract is not None
    folder, done = run.folder, run.first_update - 1
    settings = settings_changed(recorded, run.config)
    plan = json.loads(json.dumps(run.contract.as_dict()))
    planned = plan_changes(old_plan, plan)
    machine = machine_changes(_read_env(folder), start)
    kept = []
    if settings:
        kept.append(keep_aside(folder / "config.yaml", done))
    if planned:
        kept.append(keep_aside(folder / "plan.json", done))
        write_json(folder / "plan.json", plan)
    if settings:
        config = run.config.model_copy(update={"resume": ResumeConfig()})
        write_text(folder / "config.yaml", to_yaml(config))
    if machine:
        kept.append(keep_aside(folder / "env.json", done))
    named = [name for name in planned if name in NAMED_OF_PLAN]
    differing = settings | {name: planned[name] for name in named} | machine
    if not differing:
        return
    lines = [
        f"{printable(name)}: {in_words(old)} -> {in_words(new)}"
        for name, (old, new) in differing.items()
    ]
    moved = [name for name in settings if computes(name) and name.startswith(("data.", "model."))]
    same = f" ({' and '.join(moved)}: rows and base are the same by their digests)" if moved else ""
    message = f"resumed after update {done} with {'; '.join(lines)}{same}"
    run.changes = (
        *run.changes,
        Notice(
            "changed",
            f"{message}. Before: {', '.join(name for name in kept if name)}",
            {"fields": {name: list(both) for name, both in differing.items()}, "kept": kept},
        ),
    )
    run.header = (*run.header, *(f"changed   {line}" for line in lines))


def plan_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Differences between two plan.json, in what the old one knows."""
    known = {name: value for name, value in new.items() if name in old}
    if isinstance(old.get("contract"), dict) and "contract" in known:
        facts = {name: value for name, value in new["contract"].items() if name in old["contract"]}
        known["contract"] = facts
    found = config_changes({name: old[name] for name in known}, known)
    return {name.removeprefix("contract."): both for name, both in found.items()}


def machine_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Differences between two env.json in machine and versions."""
    names = ("glassloop", "git", "python", "system", "packages", "cuda", "driver", "gpus")
    known = [name for name in names if name in old]
    return config_changes({name: old[name] for name in known}, {name: new[name] for name in known})


def keep_aside(path: Path, done: int) -> str | None:
    """Copy a run's file to a name with the updates done.

    Returns that name, None if there is no file.

    An earlier copy stays: the next one is config_000020_2.yaml.
    """
    if not os.path.lexists(path):
        return None
    content = read_plain(path)
    for number in itertools.count(1):
        suffix = "" if number == 1 else f"_{number}"
        aside = path.with_stem(f"{path.stem}_{done:06d}{suffix}")
        if not os.path.lexists(aside):
            replace_file(aside, content)
            return aside.name
        if read_plain(aside) == content:
            return aside.name
    raise AssertionError


def in_words(value: Any) -> str:
    """A setting's value as people type it; odd characters are spelled out."""
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value)


def _read_env(folder: Path) -> dict[str, Any]:
    """Read env.json of the earlier start.

    {} if it is missing or damaged, as after a crash.
    """
    try:
        env = json.loads(read_plain(folder / "env.json"))
    except (OSError, ValueError):
        return {}
    return env if isinstance(env, dict) else {}
