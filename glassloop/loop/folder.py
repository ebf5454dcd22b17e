"""A run's folder: its place, its first files, its observers."""

from __future__ import annotations

import os
import secrets
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from glassloop.config import Config
from glassloop.config.arguments import to_yaml
from glassloop.data.dataset import Dataset
from glassloop.data.stored import places_of
from glassloop.disk.environment import environment
from glassloop.disk.publish import make, write_json, write_text
from glassloop.formula.dist import gather_objects
from glassloop.loop.changed import record_resume
from glassloop.loop.run import Run
from glassloop.record.observers import JsonlObserver
from glassloop.record.terminal import TerminalObserver
from glassloop.record.trackers import TrackerObserver
from glassloop.record.webhook import WebhookObserver, webhook_address


def run_folder(config: Config) -> Path:
    """The run's folder, the same on every rank.

    Raises ValueError if a new run would overwrite one.
    """
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
            f"choose another name, or resume that run: --resume {shlex.quote(str(folder))}"
        )


def observe(
    run: Run,
    dataset: Dataset,
    tracker: TrackerObserver | None,
    recorded: Config | None,
    old_plan: dict[str, Any],
) -> None:
    """Rank 0: write the folder's first files and start the observers.

    Args:
        recorded: config.yaml of the run to resume, None for a new one. old_plan: its plan.json.
    """
    config, folder = run.config, run.folder
    make(folder)
    text = config.record.text
    rows = dataset.train.rows
    places = places_of(rows) if text == "full" else {}
    jsonl = JsonlObserver(
        folder,
        text,
        row_text=lambda row_id: str(run.tokenizer.decode(list(rows[places[row_id]].input_ids))),
        check=run.lock.check if run.lock is not None else lambda: None,
    )
    start = this_start(tracker)
    if recorded is not None:
        record_resume(run, recorded, old_plan, start)
    else:
        assert run.contract is not None
        write_json(folder / "plan.json", run.contract.as_dict())
    write_json(folder / "env.json", start)
    if recorded is None:  # last: a folder with this file holds a run that can resume
        write_text(folder / "config.yaml", to_yaml(config))
    coming = range(run.first_update, run.plan.updates + 1)
    evaluations = [*([0] if run.first_update == 1 else []), *coming]
    again = (jsonl.evaluation_attempt(u) for u in evaluations)
    run.attempt = max(*again, *(jsonl.attempt(u) for u in coming))
    run.sync_records = jsonl.sync
    run.observers = [jsonl, TerminalObserver(run.plan.updates, run.replica.ranks, text=text)]
    if config.tracking.webhook is not None:
        address = webhook_address(config.tracking.webhook)
        run.observers.append(WebhookObserver(address, folder.name, folder))
    if tracker is not None:
        run.observers.append(tracker)
        run.tracker_ids, run.attach = tracker.tracker_ids, tracker.attach


def this_start(tracker: TrackerObserver | None) -> dict[str, Any]:
    """The content of env.json: machine, versions, command, launcher, trackers."""
    return environment(sys.argv) | {
        "launcher_pid": os.getppid(),
        "tracker_ids": tracker.tracker_ids() if tracker else {},
    }
