"""Where a run took place: versions, GPUs, driver, commit, command line.

No host name is kept, and no secret.

Nothing here imports torch before `environment()` is called.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import glassloop
from glassloop.disk.secrets import command_line

ENV_SCHEMA = 1
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets")
# Those that are installed decide too.
OPTIONAL_PACKAGES = ("triton", "unsloth", "unsloth_zoo", "trl", "flash-attn")


def environment(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The content of env.json as plain JSON values.

    Args:
        argv: the command line; None: this process's own.
    """
    import torch

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "schema": ENV_SCHEMA,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "glassloop": glassloop.__version__,
        "git": git_commit(Path(__file__)),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: package_version(name) for name in PACKAGES},
        "optional_packages": {
            name: found for name in OPTIONAL_PACKAGES if (found := package_version(name))
        },
        "cuda": torch.version.cuda,  # what torch was built for; None for a CPU build
        "driver": nvidia_driver(),
        "gpus": [
            {"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 2)} for gpu in gpus
        ],
        "command": command_line(sys.argv if argv is None else argv),
    }


def package_version(name: str) -> str | None:
    """Return a package's version without importing it; None if absent."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def nvidia_driver() -> str | None:
    """The NVIDIA driver's version, as nvidia-smi says; None if there is none."""
    answer = _answer(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return answer.splitlines()[0].strip() if answer else None


def git_commit(file: Path) -> dict[str, Any] | None:
    """Return the git commit of `file`.

    The answer also says whether tracked files differ from it. None for a file outside git.
    """
    git = ["git", "-C", str(file.parent)]
    # Installed inside another project's folder.
    if _answer([*git, "ls-files", "--error-unmatch", file.name]) is None:
        return None
    commit = _answer([*git, "rev-parse", "HEAD"])
    if not commit:
        return None
    return {
        "commit": commit,
        "changed": bool(_answer([*git, "status", "--porcelain", "--untracked-files=no"])),
    }


def _answer(command: list[str]) -> str | None:
    """Return what a program prints; None if it fails.

    It fails where it is missing or takes longer than 10 s.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
