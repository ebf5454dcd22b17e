"""A run's folder: where it is, what is written into it first, who observes the run."""

from __future__ import annotations

import os
import secrets
import sys
import time
from pathlib import Path
from typing import Any

from glassloop.config.arguments import to_yaml
from glassloop.config.config import Config
from glassloop.config.sections import ResumeConfig
from glassloop.data.dataset import Dataset
from glassloop.disk.environment import environment
from glassloop.disk.opening import read_plain
from glassloop.disk.publish import make, replace_file, write_json, write_text
from glassloop.formula.dist import gather_objects
from glassloop.loop.run import Run
from glassloop.record.observers import JsonlObserver
from glassloop.record.terminal import TerminalObserver
from glassloop.record.trackers import TrackerObserver


def run_folder(config: Config) -> Path:
    """The run's folder, the same on every rank. Raises ValueError if a new run would overwrite one."""
    if config.resume.run is not None:
        return Path(config.resume.run)
    made = f"{config.preset or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    folder = Path(config.run.dir) / gather_objects(config.run.name or made)[0]
    check_no_run_in(folder)
    return folder


def check_no_run_in(folder: Path) -> None:
    """Raise ValueError, on all ranks, if `folder` already holds a run."""
    if any(gather_objects(os.path.lexists(folder / "config.yaml"))):
        raise ValueError(
            f"run.name = {folder.name}: {folder} already holds a run; "
            f"choose another name, or resume that run: --resume {folder}"
        )


def observe(run: Run, dataset: Dataset, tracker: TrackerObserver | None) -> None:
    """Rank 0: write the folder's first files and start the observers."""
    config, folder = run.config, run.folder
    make(folder)
    if config.resume.run is None:
        assert run.contract is not None
        write_json(folder / "plan.json", run.contract.as_dict())
    started = {
        "launcher_pid": os.getppid(),
        "tracker_ids": tracker.tracker_ids() if tracker else {},
    }
    write_json(folder / "env.json", environment(sys.argv) | started)
    if config.resume.run is None:  # last: a folder with this file holds a run that can resume
        write_text(folder / "config.yaml", to_yaml(config))
    text = config.record.text
    by_id = {row.row_id: row for row in dataset.train.rows}
    jsonl = JsonlObserver(
        folder,
        text,
        row_text=lambda row_id: str(run.tokenizer.decode(list(by_id[row_id].input_ids))),
        check=run.lock.check if run.lock is not None else lambda: None,
    )
    coming = range(run.first_update, run.plan.updates + 1)
    evaluations = [*([0] if run.first_update == 1 else []), *coming]
    again = (jsonl.evaluation_attempt(u) for u in evaluations)
    run.attempt = max(*again, *(jsonl.attempt(u) for u in coming))
    run.sync_records = jsonl.sync
    run.observers = [jsonl, TerminalObserver(run.plan.updates, run.replica.ranks, text=text)]
    if tracker is not None:
        run.observers.append(tracker)
        run.tracker_ids = tracker.tracker_ids


def rewrite_plan(run: Run, old: dict[str, Any]) -> None:
    """If a resumed run's plan changed, rewrite plan.json and config.yaml.

    The old ones stay as plan_000020.json and config_000020.yaml.
    """
    assert run.contract is not None
    new = run.contract.as_dict()
    if all(
        old.get(name) == (list(new[name]) if name == "lr" else new[name])
        for name in ("updates", "ranks", "size", "accumulation", "lr")
    ):
        return
    for name in ("plan.json", "config.yaml"):
        path = run.folder / name
        if os.path.lexists(path):
            kept = path.with_stem(f"{path.stem}_{run.first_update - 1:06d}")
            replace_file(kept, read_plain(path))
    write_json(run.folder / "plan.json", new)
    write_text(
        run.folder / "config.yaml",
        to_yaml(run.config.model_copy(update={"resume": ResumeConfig()})),
    )
