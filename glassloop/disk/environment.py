"""Where a run took place: versions, GPUs, driver, commit, command line. No host name, and no secret.

Nothing here imports torch before `environment()` is called.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import glassloop

ENV_SCHEMA = 1
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets")
OPTIONAL_PACKAGES = (
    "triton",
    "unsloth",
    "unsloth_zoo",
    "trl",
    "flash-attn",
)  # those that are installed decide too
HIDDEN = "(hidden)"

# names whose value is a secret: HF_TOKEN, WANDB_API_KEY, AWS_ACCESS_KEY_ID; not max_tokens, not TOKENIZERS_PARALLELISM
_SECRET_NAME = re.compile(
    r"(^|[_.-])(token|key|apikey|secret|password|passwd|credentials?)([_-]id)?$", re.IGNORECASE
)
_SECRET_SHAPES = (
    re.compile(
        r"(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|wandb_v\d_\w{16,})"
    ),
    re.compile(r"(?<=://)[^/\s@]+(?=@)"),  # user:password@ of an address
    re.compile(
        r"(?<=[?&])((?:access_|api_)?(?:token|key|secret|signature|sig)=)[^&\s]+", re.IGNORECASE
    ),
)


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
    """The version of an installed package; None where it is not installed. Does not import it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def nvidia_driver() -> str | None:
    """The NVIDIA driver's version, as nvidia-smi says; None where there is none."""
    answer = _answer(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return answer.splitlines()[0].strip() if answer else None


def git_commit(file: Path) -> dict[str, Any] | None:
    """The commit that `file` is checked out from, and whether tracked files differ from it. None for a file outside git."""
    git = ["git", "-C", str(file.parent)]
    if (
        _answer([*git, "ls-files", "--error-unmatch", file.name]) is None
    ):  # installed inside another project's folder
        return None
    commit = _answer([*git, "rev-parse", "HEAD"])
    if not commit:
        return None
    return {
        "commit": commit,
        "changed": bool(_answer([*git, "status", "--porcelain", "--untracked-files=no"])),
    }


def command_line(argv: Sequence[str]) -> list[str]:
    """The command line with secrets hidden: `--hub_token abc`, `--hub_token=abc`, and what `without_secrets` knows."""
    shown: list[str] = []
    hide_next = False
    for word in argv:
        name, sign, _ = word.partition("=")
        secret = bool(_SECRET_NAME.search(name.lstrip("-")))
        if hide_next:
            word = HIDDEN
        elif secret and sign:
            word = f"{name}={HIDDEN}"
        shown.append(without_secrets(word))
        hide_next = secret and word.startswith("-") and not sign
    return shown


def without_secrets(value: Any) -> Any:
    """A copy of plain JSON values in which secrets read "(hidden)".

    Hidden are values under a secret's name, values of environment variables with such a name, and strings that look like an
    access token or carry a password in an address.
    """
    known = [
        text for name, text in os.environ.items() if _SECRET_NAME.search(name) and len(text) >= 8
    ]
    return _hide(value, sorted(known, key=len, reverse=True))


def _hide(value: Any, known: list[str]) -> Any:
    if isinstance(value, dict):
        return {
            k: HIDDEN if v is not None and _SECRET_NAME.search(str(k)) else _hide(v, known)
            for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [_hide(item, known) for item in value]
    if not isinstance(value, str):
        return value
    for secret in known:
        value = value.replace(secret, HIDDEN)
    token, address, query = _SECRET_SHAPES
    return query.sub(rf"\g<1>{HIDDEN}", address.sub(HIDDEN, token.sub(HIDDEN, value)))


def _answer(command: list[str]) -> str | None:
    """What a program prints; None where it is missing, fails or takes longer than 10 s."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
