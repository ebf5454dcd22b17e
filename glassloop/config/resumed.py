"""The run that `--resume` names.

By its folder, one of its checkpoints, or `latest`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glassloop.config.sections import RunConfig

CONFIG = "config.yaml"  # a folder with this file holds a run
LATEST = "latest"
MOST_LISTED = 8


def values_of_run(given: dict[str, str], read: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """The recorded config of the run that --resume names.

    Args:
        given: fields of the command line by dotted name; the run's folder and the checkpoint's
            number of updates are put there, run.dir is taken out (it said where to look).
        read: reads a YAML file.

    Raises:
        ValueError: there is no such run, or the command line would move it.
    """
    named = given["resume.run"]
    run, at = run_to_resume(named, Path(given.pop("run.dir", RunConfig().dir)))
    if at is not None and given.setdefault("resume.at", str(at)) != str(at):
        raise ValueError(
            f"resume.run = {named} names the checkpoint after {at} updates and resume.at = "
            f"{given['resume.at']} another: leave --at out, or name the run"
        )
    given["resume.run"] = str(run)
    values = read(run / CONFIG)
    section = values.get("run")
    recorded = section if isinstance(section, dict) else {}
    if (name := given.get("run.name", recorded.get("name"))) != recorded.get("name"):
        raise ValueError(
            f"run.name = {name}: a resumed run stays in its folder, {run}; leave run.name out"
        )
    return values


def run_to_resume(named: str, runs: Path) -> tuple[Path, int | None]:
    """Find the run's folder, and the update of a named checkpoint.

    Args:
        named: the value of --resume. runs: the folder that holds runs, run.dir.

    Raises:
        ValueError: there is no such run; lists those that exist.
    """
    if named == LATEST and not Path(named).exists():
        if not (found := runs_in(runs)):
            raise ValueError(f"resume.run = {LATEST}: {runs} holds no run; {_listed(runs)}")
        return found[0], None
    path = Path(named)
    checkpoint = re.fullmatch(r"update_(\d{6,})", path.name)
    if checkpoint and path.parent.name == "checkpoints":
        run, at = path.parent.parent, int(checkpoint[1])
    else:
        run, at = path, None
    if (run / CONFIG).is_file():
        return run, at
    if not run.is_dir():
        raise ValueError(f"resume.run = {named}: there is no such folder; {_listed(runs)}")
    where = run if runs_in(run) else runs
    raise ValueError(f"resume.run = {named} holds no run (no {CONFIG}); {_listed(where)}")


def runs_in(folder: Path) -> list[Path]:
    """The runs in a folder, the one that was started last first."""
    started = {}
    for file in folder.glob(f"*/{CONFIG}"):
        files = (file, file.with_name("env.json"))  # every start writes env.json
        started[file.parent] = max(one.stat().st_mtime for one in files if one.exists())
    return sorted(started, key=lambda run: (started[run], run.name), reverse=True)


def _listed(folder: Path) -> str:
    found = [str(run) for run in runs_in(folder)]
    if not found:
        return f"there are no runs in {folder} (run.dir=FOLDER names another folder of runs)"
    more = f" and {len(found) - MOST_LISTED} more" if len(found) > MOST_LISTED else ""
    return f"name one of the runs in {folder}: {', '.join(found[:MOST_LISTED])}{more}"
