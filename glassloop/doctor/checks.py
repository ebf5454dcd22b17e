"""Checks of a machine before a run: versions, driver, cards, disk, logins.

Each says what is wrong and what cures it. Nothing here imports torch: its files say what it was
built for. Secrets are looked for and never read out.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from glassloop.config import Config
from glassloop.disk.environment import package_version
from glassloop.doctor.findings import NOTE, OK, PROBLEM, Finding
from glassloop.engines import unsloth_checks
from glassloop.plan.engine import planned_engine
from glassloop.plan.outlook import disk_state_bytes
from glassloop.plan.targets import trainable, with_targets
from glassloop.plan.work import work_of
from glassloop.predict.shapes import shapes_of
from glassloop.predict.terms import GIB, base_bytes

TESTED = {  # package: lowest and highest version that the tests ran with
    "torch": ("2.11", "2.13"),
    "transformers": ("5.17", "5.23"),
    "peft": ("0.21", "0.21"),
    "accelerate": ("1.15", "1.15"),
    "bitsandbytes": ("0.50", "0.50"),
    "datasets": ("4.7", "5.2"),
}
PINS = {
    "unsloth": (
        ("torch", "<", "2.15"),
        ("transformers", "<=", "5.17.0"),
        ("trl", "<=", "1.15.0"),
        ("datasets", "<", "5.0.0"),
    )
}


def numbers(version: str) -> tuple[int, ...]:
    """(2, 11, 0) of "2.11.0+cu130"."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def check_compiled(environment: Mapping[str, str], torch: Path | None = None) -> list[Finding]:
    """Check that Python keeps what it compiles.

    A launch of 31 s took 18 where it does. torch: its folder; None: where it is installed.
    """
    spec = None if torch else importlib.util.find_spec("torch")
    folder = Path(spec.origin).parent if spec and spec.origin else torch
    if folder is None or not environment.get("PYTHONDONTWRITEBYTECODE"):
        return []
    kept = folder / "__pycache__" / f"__init__.{sys.implementation.cache_tag}.pyc"
    if kept.is_file():
        return []
    return [
        Finding(
            NOTE,
            "python",
            "each launch compiles torch's modules anew, some 10 s of it: PYTHONDONTWRITEBYTECODE "
            "is set, and nobody compiled them before",
            "unset PYTHONDONTWRITEBYTECODE, or python -m compileall once",
        )
    ]


def check_versions(installed: Callable[[str], str | None] = package_version) -> list[Finding]:
    """Packages against what the tests ran with."""
    found = []
    for name, (lowest, highest) in TESTED.items():
        version = installed(name)
        if version is None:
            found.append(
                Finding(
                    PROBLEM, name, "not installed", f"pip install 'glassloop' (or {name}>={lowest})"
                )
            )
        elif numbers(version) < numbers(lowest):
            found.append(
                Finding(
                    PROBLEM,
                    name,
                    f"{version}: older than {lowest}",
                    f"pip install '{name}>={lowest}'",
                )
            )
        elif numbers(version)[: len(numbers(highest))] > numbers(highest):
            found.append(
                Finding(
                    NOTE,
                    name,
                    f"{version}: newer than the tested {lowest} to {highest}",
                    "constraints.txt has tested versions",
                )
            )
        else:
            found.append(Finding(OK, name, f"{version}, tested {lowest} to {highest}"))
    return found


def check_pins(installed: Callable[[str], str | None] = package_version) -> list[Finding]:
    """Packages that cap versions of others, where they are installed."""
    found = []
    for owner, pins in PINS.items():
        version = installed(owner)
        wanted = ", ".join(f"{name}{sign}{bound}" for name, sign, bound in pins)
        if version is None:
            found.append(Finding(OK, owner, f"not installed (2026.10 would need {wanted})"))
            continue
        broken = [
            f"{name} {there}"
            for name, sign, bound in pins
            if (there := installed(name)) and not _within(there, sign, bound)
        ]
        if broken:
            cure = f"give {owner} an environment of its own, without constraints.txt"
            found.append(
                Finding(
                    PROBLEM, owner, f"{version} needs {wanted}, here are {', '.join(broken)}", cure
                )
            )
        else:
            found.append(Finding(OK, owner, f"{version}; its pins hold ({wanted})"))
    return found


def check_engine(
    config: Config,
    *,
    on_cuda: bool,
    problems: Callable[..., Sequence[str]] = unsloth_checks.problems,
) -> list[Finding]:
    """Check that execution.engine can run here; name the one that auto chooses."""
    try:
        planned = planned_engine(config)[1]
    except ValueError as error:
        return [Finding(PROBLEM, "engine", str(error))]
    if config.execution.engine == "auto":
        return [Finding(OK, "engine", planned)]
    if config.execution.engine != "unsloth":
        return []
    found = [
        Finding(
            PROBLEM,
            "engine",
            f"unsloth: {text}",
            f"{unsloth_checks.OWN_PLACE}; or execution.engine=peft",
        )
        for text in problems(on_cuda=on_cuda)
        if text != unsloth_checks.OWN_PLACE
    ]
    return found or [
        Finding(
            OK,
            "engine",
            "unsloth can be imported here; its base is compared with peft's when a run begins",
        )
    ]


def _within(version: str, sign: str, bound: str) -> bool:
    width = len(numbers(bound))
    here = (numbers(version) + (0,) * width)[:width]
    return here < numbers(bound) or (sign == "<=" and here == numbers(bound))


def torch_cuda() -> str | None:
    """CUDA version of the installed torch; None without one.

    torch is not imported.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    return cuda_in((Path(spec.origin).parent / "version.py").read_text(encoding="utf-8"))


def cuda_in(text: str) -> str | None:
    """CUDA's version in the text of torch/version.py."""
    built = re.search(r"^cuda[^=\n]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return built.group(1) if built else None


def check_disk(
    config: Config, environ: Mapping[str, str], free: Callable[[Path], int] | None = None
) -> list[Finding]:
    """Room for the download, the quantised copy, checkpoints and capsules."""
    free = free or (lambda path: shutil.disk_usage(path).free)
    shapes, why = shapes_of(config.model.id)
    if shapes is None:
        return [Finding(NOTE, "disk", f"sizes are not known: {why}")]
    try:
        n = trainable(shapes, with_targets(config, shapes.linear_layers).lora)
    except ValueError as error:
        return [Finding(PROBLEM, "adapters", str(error))]
    one = round((4 + disk_state_bytes(config.optimizer.name)) * n)
    kept = (
        config.checkpoint.keep + 1 + (config.data.heldout is not None)
    )  # a new one is written before the oldest goes
    run = kept * one + (round(config.record.capsules_gib * GIB) if config.record.capsules else 0)
    cache = Path(
        config.model.cache_dir or environ.get("GLASSLOOP_CACHE") or "~/.cache/glassloop"
    ).expanduser()
    base = (
        sum(base_bytes(shapes, work_of(config, shapes)).values())
        if config.model.quantization == "nf4"
        else 0
    )
    hub = Path(
        environ.get("HF_HUB_CACHE")
        or Path(environ.get("HF_HOME") or "~/.cache/huggingface") / "hub"
    ).expanduser()
    remote = config.model.id != "smollm2" and not Path(config.model.id).expanduser().is_dir()
    there = (
        any(hub.glob(f"models--{config.model.id.replace('/', '--')}/snapshots/*/*.safetensors"))
        if remote
        else True
    )
    needs = [
        ("run.dir", Path(config.run.dir).expanduser(), run, "checkpoints and capsules"),
        ("model.cache_dir", cache, base, "the quantised base, made once"),
        ("HF_HOME", hub, 0 if there else 2 * shapes.weights, "the download of the model"),
    ]
    found, spoken = [], {}
    for field, folder, needed, what in needs:
        if not needed:
            continue
        place = next(
            parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists()
        )
        disk = place.stat().st_dev
        spoken[disk] = spoken.get(disk, 0) + needed  # what shares a disk adds up
        shared = (
            f", {spoken[disk] / GIB:.1f} with what else goes there" if spoken[disk] > needed else ""
        )
        text = (
            f"{what}: {needed / GIB:.1f} GiB in {folder}{shared}; {free(place) / GIB:.1f} GiB free"
        )
        short = spoken[disk] > free(place)
        found.append(
            Finding(
                PROBLEM if short else OK,
                "disk",
                text,
                f"make room, or move {field}" if short else "",
            )
        )
    return found


def check_logins(config: Config, environ: Mapping[str, str]) -> list[Finding]:
    """Check that logins of hub and trackers exist; none is shown."""
    from glassloop.record.tracker_checks import check_tracking

    home = Path(environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    token = Path(environ.get("HF_TOKEN_PATH") or home / "token").expanduser()
    has = bool(
        environ.get("HF_TOKEN")
        or environ.get("HUGGING_FACE_HUB_TOKEN")
        or (token.is_file() and token.stat().st_size)
    )
    text = (
        "a token is there (not shown, not tried)"
        if has
        else "no token: public models and data sets only"
    )
    found = [
        Finding(
            OK if has else NOTE,
            "hub login",
            text,
            "" if has else "`hf auth login` for gated or private ones",
        )
    ]
    if environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        found.append(
            Finding(
                NOTE,
                "hub login",
                "HF_HUB_OFFLINE is set: nothing will be downloaded",
                "unset HF_HUB_OFFLINE",
            )
        )
    try:
        check_tracking(config.tracking)
    except ValueError as error:
        found.append(Finding(PROBLEM, "trackers", str(error), "tracking.to=null does without"))
    else:
        found.append(Finding(OK, "trackers", ", ".join(config.tracking.to) or "none asked for"))
    return found
