"""Spoil a run's folder, and read it in every way."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from glassloop.record.jsonl import KINDS
from glassloop.record.reading import read_config, read_run, row_records, trajectory, usual
from glassloop.report.compare_page import comparison_payload
from glassloop.report.compare_text import render
from glassloop.report.comparing import compare
from glassloop.report.following import Watched
from glassloop.report.page import page
from glassloop.report.payload import payload
from glassloop.report.watching import Screen
from glassloop.study.divergence import where_to_look
from glassloop.study.quantities import measured

ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**30, 1.5, 1e300),
    *("", "nan", "-inf", "text", "\x1b[31m"),
    *([], [[]], ["nan"], [None], {}, {"a": {}}),
)


def read_everything(folder: Path, other: Path) -> None:
    """Read a run as reports, comparisons, views, replays and studies do."""
    run = read_run(folder)
    for text in (True, False):
        page(payload(run, text=text))
    measured(run)
    where_to_look(run)
    if run.updates:
        found = compare([run, read_run(other)])
        page(comparison_payload(found))
        shown(render(found))
        update = run.updates[-1]["update"]
        usual(trajectory(folder, update), update)
    row_records(folder)
    read_config(folder)
    watched = Watched(folder)
    watched.refresh()
    shown(Screen(watched))


def shown(what: Any, width: int = 100) -> str:
    console = Console(width=width, height=30, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(what)
    return captured.get()


def spoil(folder: Path, drawn: random.Random) -> str:
    """Change one value at any depth of one file; says where."""
    path = folder / drawn.choice([*KINDS, "plan.json", "env.json", "config.yaml"])
    if path.name in KINDS:
        lines = path.read_text(encoding="utf-8").splitlines()
        place = drawn.randrange(len(lines))
        value = json.loads(lines[place])
        where = change(value, drawn)
        lines[place] = json.dumps(value)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return f"{path.name}, line {place + 1}: {where}"
    value = yaml.safe_load(path.read_text(encoding="utf-8"))
    where = change(value, drawn)
    path.write_text(json.dumps(value), encoding="utf-8")
    return f"{path.name}: {where}"


def change(value: Any, drawn: random.Random, where: str = "") -> str:
    """Replace or remove something in the value, and say what."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not keys:
        return f"{where} (left alone)"
    key = drawn.choice(keys)
    if isinstance(value[key], dict | list) and drawn.random() < 0.6:
        return change(value[key], drawn, f"{where}.{key}")
    if drawn.random() < 0.2:
        del value[key]
        return f"{where}.{key} removed"
    value[key] = drawn.choice(ODD)
    return f"{where}.{key} = {value[key]!r}"


def copied(folder: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to)
    return to
