"""Checks from package metadata that Unsloth can run here.

They come before its import, which could fail in the middle or patch what is beside it. The standard
library only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib import metadata

TESTED = "2026.10.9"
LIMITS = (
    "torch<2.15.0",
    "transformers<=5.17.0",
    "trl<=1.15.0",
    "datasets<5.0.0",
)  # of the tested version
# What its import needs. It asks for more (sentencepiece, diffusers, a server's packages), which
# training does without.
DECIDING = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "datasets",
    "accelerate",
    "bitsandbytes",
    "triton",
    "huggingface-hub",
    "unsloth-zoo",
)
OWN_PLACE = (
    "Give Unsloth an environment of its own, without constraints.txt: pip install "
    "'glassloop[unsloth]'"
)
OTHER_ENGINE = "or set execution.engine=peft"


def installed_version(name: str) -> str | None:
    """Version of an installed package; None if it is missing.

    Imports nothing.
    """
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def requirements_of(name: str) -> Sequence[str]:
    """Requirements of an installed package, as its metadata has them."""
    try:
        return metadata.requires(name) or ()
    except metadata.PackageNotFoundError:
        return ()


def conflicts(
    installed: Callable[[str], str | None] = installed_version,
    requirements: Callable[[str], Sequence[str]] = requirements_of,
) -> list[str]:
    """Name what keeps an installed Unsloth from being imported.

    A line each: package, version here, versions it admits, and the pip line.
    """
    found: dict[str, str] = {}
    for owner in ("unsloth", "unsloth-zoo"):
        for line in requirements(owner):
            wanted, _, condition = line.partition(";")
            match = re.match(r"\s*([A-Za-z0-9._-]+)\s*(?:\[[^]]*\])?\s*\(?([^)]*)\)?\s*$", wanted)
            name = re.sub(r"[-_.]+", "-", match[1]).lower() if match else ""
            if match is None or name not in DECIDING or "extra" in condition or name in found:
                continue
            here, bounds = installed(name), match[2].replace(" ", "")
            cure = f"pip install '{name}{limits_of(bounds)}'"
            if here is None:
                found[name] = (
                    f"{name} is not installed, {owner} {installed(owner)} needs it: {cure}"
                )
            elif broken := [
                bound for bound in bounds.split(",") if bound and not within(here, bound)
            ]:
                found[name] = (
                    f"{name} {here} is here, {owner} {installed(owner)} admits "
                    f"{name}{','.join(broken)}: {cure}"
                )
    return list(found.values())


def limits_of(bounds: str) -> str:
    """Bounds that a new install must keep.

    Exclusions of single versions are left out, for brevity.
    """
    return ",".join(bound for bound in bounds.split(",") if bound and not bound.startswith("!="))


def within(version: str, bound: str) -> bool:
    """True if a version keeps one bound (`<=5.17.0`, `!=4.4.*`).

    A local part (`+cu130`) does not count.
    """
    match = re.match(r"(<=|>=|==|!=|~=|<|>)\s*(\d+(?:\.\d+)*)(\.\*)?", bound)
    if match is None:
        return True  # a form that is not known decides nothing
    sign, there = match[1], numbers(match[2])
    here = numbers(version)
    if match[3]:
        same = here[: len(there)] == there
        return same if sign == "==" else not same
    width = max(len(here), len(there))
    here, there = (value + (0,) * (width - len(value)) for value in (here, there))
    return {
        "<": here < there,
        "<=": here <= there,
        ">": here > there,
        ">=": here >= there,
        "~=": here >= there,
        "==": here == there,
        "!=": here != there,
    }[sign]


def numbers(version: str) -> tuple[int, ...]:
    """(2, 11, 0) of "2.11.0+cu130"; suffixes such as rc1 do not count."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def problems(
    *,
    on_cuda: bool,
    installed: Callable[[str], str | None] = installed_version,
    requirements: Callable[[str], Sequence[str]] = requirements_of,
) -> list[str]:
    """Name all that keeps unsloth from running here, with cures.

    A line each; empty if it can be tried.
    """
    if installed("unsloth") is None:
        return [f"it is not installed ({TESTED} admits {', '.join(LIMITS)}). {OWN_PLACE}"]
    found = conflicts(installed, requirements)
    if found:
        found.append(OWN_PLACE)
    if not on_cuda:
        found.append(
            "it computes on GPUs only, and torch sees no CUDA device here (or the launch file "
            "asks for CPUs)"
        )
    return found


def check_unsloth(*, on_cuda: bool) -> None:
    """Raise ValueError naming all that keeps Unsloth from running here. Imports nothing."""
    if found := problems(on_cuda=on_cuda):
        raise ValueError(
            "execution.engine = unsloth cannot run here:\n  " + "\n  ".join([*found, OTHER_ENGINE])
        )
