"""The point at which a run resumes: its checkpoint, its past."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from glassloop.config import BatchConfig, Config, as_dict
from glassloop.disk.opening import read_plain
from glassloop.disk.publish import SUMS
from glassloop.plan.steps import StepPlan, counted
from glassloop.saved.changes import WHERE_BASE, check_same_math
from glassloop.saved.checkpoint import best_checkpoint, last_checkpoint, read_state
from glassloop.saved.run_state import RunState


def after_restart(config: Config) -> Config:
    """The config of a process that the launcher restarted (--max_restarts).

    It resumes the run of the first start.

    The run is the newest in run.dir that this launcher began. One without a complete checkpoint
    begins anew, in the same folder.
    """
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return config
    folder = (
        Path(config.resume.run)
        if config.resume.run is not None
        else _begun_by(os.getppid(), Path(config.run.dir))
    )
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
            env = json.loads(read_plain(path))
        except (OSError, ValueError):
            continue
        if env.get("launcher_pid") == launcher and (path.parent / "config.yaml").exists():
            found.append((path.stat().st_mtime, path.parent))
    return max(found)[1] if found else None


def find_checkpoint(config: Config) -> tuple[Path | None, tuple[str, ...]]:
    """The checkpoint to resume from: the last whole, or --at.

    None for a new run and for --at 0. With a note for each one that was passed over. Raises
    ValueError if there is none, or it is not complete.
    """
    if config.resume.run is None:
        return None, ()
    folder = Path(config.resume.run)
    if config.resume.at is not None:
        return checkpoint_at(folder, config.resume.at), ()
    checkpoint, notes = last_checkpoint(folder)
    if checkpoint is None:
        found = "; ".join(notes) or "there is none"
        raise ValueError(
            f"resume.run = {folder} has no complete checkpoint ({found}): begin it again "
            f"(--resume {shlex.quote(str(folder))} --at 0), or name another folder"
        )
    return checkpoint, notes


def beginning(recorded: dict[str, Any], plan: dict[str, Any], ranks: int) -> RunState:
    """The state of a run that begins again (--at 0).

    Args:
        recorded: its config. plan: its plan.json. ranks: of this start, if the plan has none.
    """
    before = int(plan.get("ranks", ranks))
    return RunState(update=0, epoch=0, world_size=before, base_hash="", config=recorded)


def check_same_beginning(
    saved: RunState, config: Config, ranks: int, allowed: Collection[str]
) -> None:
    """Raise ValueError if a run that begins again would compute something else.

    Args:
        allowed: fields that may differ all the same; the base is not known here, so it may not.
    """
    if saved.world_size != ranks and not config.resume.reshape:
        raise ValueError(
            f"resume.run = {config.resume.run} began with {saved.world_size} ranks, this start has "
            f"{ranks}: start {saved.world_size} (accelerate launch --num_processes "
            f"{saved.world_size}), or resume with {ranks}: --resume.reshape"
        )
    others = [name for name in allowed if name not in WHERE_BASE]
    cure = "leave it as it was, or begin a new run"
    check_same_math(saved.config, as_dict(config), others, cure)


def sums_of(checkpoint: Path | None) -> str:
    """A checkpoint's name and a digest of its sums, to compare ranks."""
    if checkpoint is None:
        return "none"
    return (
        f"{checkpoint.name}, sums {hashlib.sha256(read_plain(checkpoint / SUMS)).hexdigest()[:16]}"
    )


def checkpoint_at(folder: Path, update: int) -> Path | None:
    """The run's checkpoint after `update` updates; None for 0, the beginning.

    Raises ValueError with the checkpoints that exist.
    """
    found = {
        path: read_state(path).update
        for path in sorted((folder / "checkpoints").glob("update_*[0-9]"))
    }
    for path, done in found.items():
        if done == update:
            return path
    if update == 0 and (folder / "config.yaml").exists():
        return None
    there = ", ".join(map(str, sorted({0, *found.values()})))
    raise ValueError(
        f"resume.at = {update}: {folder} has no checkpoint after {counted(update, 'update')}; "
        f"there are {there} (0: from the beginning)"
    )


def position(
    checkpoint: Path | None, plan: StepPlan, run: str | None
) -> tuple[int, dict[str, str]]:
    """Updates done and tracker ids; (0, {}) for a new run.

    The checkpoint itself is verified when it is loaded.

    A run that begins again (--at 0) has no checkpoint to tell its trackers by; env.json names them.
    """
    if checkpoint is None:
        return 0, {} if run is None else _tracker_ids(Path(run))
    state = read_state(checkpoint)
    if state.update >= plan.updates:
        raise ValueError(
            f"resume.run = {checkpoint.parent.parent} has done all of its {plan.updates} "
            "updates: there is nothing to resume; "
            f"to train further, name more: schedule.updates={2 * plan.updates}; to begin "
            "a new schedule from its adapter, start a run with "
            f"--init_adapter {shlex.quote(str(checkpoint))}"
        )
    return state.update, state.tracker_ids


def _tracker_ids(run: Path) -> dict[str, str]:
    try:
        ids = json.loads(read_plain(run / "env.json"))["tracker_ids"]
        return {str(name): str(value) for name, value in ids.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # it died before it wrote one, or an older glassloop did


def reshaped(config: Config, saved: RunState, ranks: int) -> Config:
    """The config of a run that resumes with `ranks` ranks.

    Rows of an update stay, accumulation follows.

    Raises ValueError, with batch sizes that fit, where the rows do not divide.
    """
    before = BatchConfig.model_validate(saved.config["batch"])
    rows = before.size * saved.world_size * before.accumulation_for(saved.world_size)
    batch = config.batch.model_copy(
        update={"rows_per_update": rows, "accumulation": None, "ranks": None}
    )
    batch.accumulation_for(ranks)
    return config.model_copy(update={"batch": batch})


def with_past(plan: StepPlan, old: dict[str, Any], done: int) -> StepPlan:
    """The plan with the learning rates that the `done` updates had.

    Args:
        old: plan.json of the run at that time.
    """
    return replace(plan, lr=(*old.get("lr", plan.lr)[:done], *plan.lr[done:]))


def best_heldout(folder: Path) -> float:
    """The lowest held-out loss of the run's checkpoints, in nats a token.

    Infinite if none has one.
    """
    best = best_checkpoint(folder)
    loss = None if best is None else read_state(best).heldout_loss_nats
    return math.inf if loss is None else loss


def read_plan(folder: Path, name: str = "plan.json") -> dict[str, Any]:
    """Read plan.json of a run; {} if there is none.

    Raises ValueError if it is damaged.
    """
    path = folder / name
    try:
        return json.loads(read_plain(path))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): put back a copy, or remove it to resume without "
            "its rows' digest"
        ) from None
