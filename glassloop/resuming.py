"""Where a run that is taken up again goes on: its checkpoint, what it has done, what it began with."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from glassloop.checkpoint import best_checkpoint, last_checkpoint, read_state
from glassloop.config import Config
from glassloop.plan import StepPlan


def after_restart(config: Config) -> Config:
    """The config of a process that the launcher has started again (--max_restarts): it goes on with the run of the first start.

    The run is the newest in run.dir that this launcher began. One without a complete checkpoint begins anew, in the same folder.
    """
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return config
    folder = Path(config.resume.run) if config.resume.run is not None else _begun_by(os.getppid(), Path(config.run.dir))
    if folder is None:
        return config
    at = None if last_checkpoint(folder)[0] is not None else 0
    resume = config.resume.model_copy(update={"run": str(folder), "at": at})
    return config.model_copy(update={"resume": resume})


def _begun_by(launcher: int, runs: Path) -> Path | None:
    """The newest run of the folder whose env.json names this launcher's process."""
    found = []
    for path in runs.glob("*/env.json"):
        try:
            env = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if env.get("launcher_pid") == launcher and (path.parent / "config.yaml").exists():
            found.append((path.stat().st_mtime, path.parent))
    return max(found)[1] if found else None


def find_checkpoint(config: Config) -> Path | None:
    """The checkpoint that --resume goes on from: the last one, or that of --at. None for a new run and for --at 0.

    Raises ValueError where there is none, or it is not complete.
    """
    if config.resume.run is None:
        return None
    folder = Path(config.resume.run)
    if config.resume.at is not None:
        return checkpoint_at(folder, config.resume.at)
    checkpoint, notes = last_checkpoint(folder)
    if checkpoint is None:
        found = "; ".join(notes) or "there is none"
        raise ValueError(
            f"resume.run = {folder} has no complete checkpoint ({found}): begin it again (--resume {folder} --at 0), or name another folder"
        )
    return checkpoint


def checkpoint_at(folder: Path, update: int) -> Path | None:
    """The run's checkpoint after `update` updates; None for 0, the run's beginning. Raises ValueError, with those that there are."""
    found = {path: read_state(path).update for path in sorted((folder / "checkpoints").glob("update_*[0-9]"))}
    for path, done in found.items():
        if done == update:
            return path
    if update == 0 and (folder / "config.yaml").exists():
        return None
    there = ", ".join(map(str, sorted({0, *found.values()})))
    raise ValueError(
        f"resume.at = {update}: {folder} has no checkpoint after {update} updates; there are {there} (0: from the beginning)"
    )


def position(checkpoint: Path | None, plan: StepPlan) -> tuple[int, dict[str, str]]:
    """Updates done and tracker ids of the run that goes on; (0, {}) for a new one. The checkpoint itself is verified when it is loaded."""
    if checkpoint is None:
        return 0, {}
    state = read_state(checkpoint)
    if state.update >= plan.updates:
        raise ValueError(
            f"resume.run = {checkpoint.parent.parent} has done all of its {plan.updates} updates: there is nothing to go on with; "
            f"to train further from its adapter, start a run with --init_adapter {checkpoint}"
        )
    return state.update, state.tracker_ids


def best_heldout(folder: Path) -> float:
    """The lowest held-out loss of the run's checkpoints, in nats a token; infinite where none has one."""
    best = best_checkpoint(folder)
    loss = None if best is None else read_state(best).heldout_loss_nats
    return math.inf if loss is None else loss


def read_plan(folder: Path) -> dict[str, Any]:
    """plan.json of a run; {} where there is none. Raises ValueError where it is damaged."""
    path = folder / "plan.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): put back a copy, or remove it to go on without its rows' digest"
        ) from None
