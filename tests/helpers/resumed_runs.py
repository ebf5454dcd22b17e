"""Runs that resume with other settings, and what their folders tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from glassloop.config.arguments import parse
from glassloop.loop import build
from glassloop.record.jsonl import read_jsonl


def resumed(folder: Path, *words: str, start: bool = True, close: bool = True) -> Any:
    """Resume a run up to the events of its start.

    It is built anew, as its own process would.
    """
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    run = build.build_run(parse(["--resume", str(folder), *words]))
    if start:
        run.evaluate = lambda update: None
        run.start()
    if close:
        run.close_observers()
    return run


def changed_events(folder: Path) -> list[dict[str, Any]]:
    return [event for event in read_jsonl(folder / "events.jsonl") if event["kind"] == "changed"]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def value_of(folder: Path, name: str, file: str = "config.yaml") -> Any:
    section, _, field = name.partition(".")
    return yaml.safe_load((folder / file).read_text())[section][field]
