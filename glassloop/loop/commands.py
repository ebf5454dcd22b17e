"""Commands that a run tells people to type."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from glassloop.config.arguments import STARTED_BY
from glassloop.health.signals import Finding

CALL = "caller: Your card is blocked. Read me the code that we just sent you."


def launch_command(ranks: int, *, on_cuda: bool) -> str:
    """First words of a command that starts `ranks` ranks like this one.

    Like this one: by the launcher, or by `glassloop train`.
    """
    if STARTED_BY in os.environ:
        return "glassloop train"
    if not on_cuda:
        name, processes = "cpu_2proc", "" if ranks == 2 else f" --num_processes {ranks}"
    elif ranks == 1:
        name, processes = "single_gpu", ""
    else:
        name, processes = "ddp_2gpu", "" if ranks == 2 else f" --num_processes {ranks}"
    file = f"accelerate_configs/{name}.yaml"
    return f"accelerate launch --config_file {file}{processes} train_loop.py"


def generate_command(folder: Path, form: str) -> str:
    """The command that asks a finished run. form: data.format."""
    return (
        f'glassloop generate {shlex.quote(str(folder))} --call "{CALL}"'
        if form == "scam"
        else (f'glassloop generate {shlex.quote(str(folder))} "YOUR QUESTION"')
    )


def evaluate_command(folder: Path) -> str:
    """The command that evaluates a run's adapter."""
    return f"glassloop evaluate {shlex.quote(str(folder))}"


def replay_command(folder: Path, update: int) -> str:
    """The command that looks for the cause of an update."""
    return f"glassloop replay {shlex.quote(str(folder))} --update {update} --bisect"


def replay_of(finding: Finding, folder: Path, update: int) -> str:
    """The command that looks for the cause of a finding about `update`.

    An alarm for divergence comes once it has lasted: the cause is the step before the loss rose.
    """
    if finding.kind == "diverged":
        return f"{replay_command(folder, max(1, int(finding.details['since']) - 1))} --try"
    return replay_command(folder, update)
