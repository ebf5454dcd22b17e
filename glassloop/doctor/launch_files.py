"""The launcher's influence on a run: its config file and ACCELERATE_* variables.

No Accelerate is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glassloop.config import Config
from glassloop.doctor.findings import NOTE, OK, PROBLEM, Finding

REFUSED = {
    "DEEPSPEED": "DeepSpeed steps inside its own backward (a ZeRO stage, 3 included, brings its "
    "own "
    "too)",
    "FSDP": "FSDP shards what the flat adapter buffer holds whole",
    "MEGATRON_LM": "Megatron-LM brings its own loop",
}
OWN_FILES = "give the launcher a file of accelerate_configs/ with --config_file"


def default_config_file(environ: Mapping[str, str]) -> Path | None:
    """Find the file that `accelerate config` wrote; None if there is none.

    Every launch without --config_file reads it.
    """
    cache = (
        environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    )
    folder = Path(cache).expanduser() / "accelerate"
    return next(
        (
            file
            for name in ("default_config.yaml", "default_config.json")
            if (file := folder / name).is_file()
        ),
        None,
    )


def check_launcher(
    config: Config, environ: Mapping[str, str], file: Path | None = None
) -> list[Finding]:
    """Check a launcher's config file and ACCELERATE_* variables.

    The file is `file`, else the default one.
    """
    found = [
        Finding(
            NOTE,
            "launcher",
            "--gradient_accumulation_steps given to accelerate launch has no effect: the loop "
            "accumulates itself",
            "batch.accumulation or batch.rows_per_update",
        )
    ]
    chosen = file or default_config_file(environ)
    if chosen is None:
        found.append(
            Finding(OK, "launcher", "no default Accelerate config file that could interfere")
        )
    else:
        found += _launch_file(
            config,
            chosen,
            "launch file" if file else "default Accelerate config (used without --config_file)",
        )
    if environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() not in ("no", ""):
        backend = environ["ACCELERATE_DYNAMO_BACKEND"]
        text = f"ACCELERATE_DYNAMO_BACKEND={backend} would compile the model"
        found.append(Finding(PROBLEM, "launcher", text, "unset ACCELERATE_DYNAMO_BACKEND"))
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM"):
        if environ.get(name, "false").lower() in ("1", "true", "yes"):
            found.append(
                Finding(
                    PROBLEM,
                    "launcher",
                    f"{name} is set: {REFUSED[name.removeprefix('ACCELERATE_USE_')]}",
                    f"unset {name}",
                )
            )
    return found


def _launch_file(config: Config, path: Path, what: str) -> list[Finding]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return [
            Finding(
                PROBLEM,
                "launcher",
                f"{what} {path} cannot be read: {' '.join(str(error).split())[:200]}",
                OWN_FILES,
            )
        ]
    if not isinstance(values, dict):
        return [Finding(PROBLEM, "launcher", f"{what} {path} holds no settings", OWN_FILES)]
    found = []
    kind = str(values.get("distributed_type", "NO")).upper()
    processes = values.get("num_processes", 1)
    if kind in REFUSED:
        found.append(
            Finding(
                PROBLEM, "launcher", f"{what}: distributed_type {kind}: {REFUSED[kind]}", OWN_FILES
            )
        )
    elif kind == "MULTI_CPU" or (kind == "NO" and isinstance(processes, int) and processes > 1):
        found.append(
            Finding(
                PROBLEM,
                "launcher",
                f"{what}: {kind} with num_processes {processes} starts one process",
                OWN_FILES,
            )
        )
    elif kind not in ("NO", "MULTI_GPU"):
        found.append(
            Finding(
                PROBLEM,
                "launcher",
                f"{what}: distributed_type {kind} has not been tried",
                OWN_FILES,
            )
        )
    own = {"bf16": "bf16", "fp16": "fp16", "fp32": "no"}[config.execution.precision]
    mixed = values.get("mixed_precision")
    if isinstance(mixed, bool):  # YAML's no and yes
        mixed = "yes" if mixed else "no"
    if mixed not in (None, own, "no"):
        text = (
            f"{what}: mixed_precision {mixed} has no effect: execution.precision = "
            f"{config.execution.precision} decides"
        )
        found.append(Finding(NOTE, "launcher", text))
    if _holds(values, "gradient_accumulation_steps"):
        text = f"{what}: gradient_accumulation_steps has no effect: the loop accumulates itself"
        found.append(Finding(NOTE, "launcher", text, "batch.accumulation or batch.rows_per_update"))
    backend = str(
        values.get("dynamo_backend")
        or (values.get("dynamo_config") or {}).get("dynamo_backend")
        or "NO"
    ).upper()
    if backend != "NO":
        found.append(
            Finding(
                PROBLEM,
                "launcher",
                f"{what}: dynamo_backend {backend} would compile the model",
                OWN_FILES,
            )
        )
    if config.batch.ranks is not None and processes != config.batch.ranks:
        text = (
            f"{what}: num_processes {processes}, batch.ranks = {config.batch.ranks}: such a start "
            "is refused"
        )
        found.append(Finding(PROBLEM, "launcher", text, f"--num_processes {config.batch.ranks}"))
    return found or [Finding(OK, "launcher", f"{what} {path}: {kind}, {processes} processes")]


def _holds(values: Any, name: str) -> bool:
    """Tell if any nested setting is other than 1."""
    if not isinstance(values, dict):
        return False
    return values.get(name, 1) not in (1, "1", "auto", None) or any(
        _holds(value, name) for value in values.values()
    )
