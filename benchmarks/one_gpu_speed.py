"""The part `speed` of one_gpu.py: tokens/s that `fused` is to reach on an 8B. No torch.

Each case is an arm of `glassloop bench`. All are profiled too, in runs of their own, so that a case
below its mark comes with what its update was made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from one_gpu_commands import Command, Ended, Here, Part, marked
from suite import Verdict, failed

from glassloop.bench.results import arms, read

PROFILED = 4  # the update that is looked at; the first ones compile and make room
PAGE_LINES = 60  # of a profile's page, which the results keep


@dataclass(frozen=True)
class Case:
    """One arm, its least tokens/s and its most GiB; None: any."""

    workload: str
    layout: str
    profile: str
    tokens_s: float
    gib: float | None = None


CASES = {
    "full rows": Case("full-v1", "packed", "fill", 18_500),
    "full rows within 23.5 GiB": Case("full-v1", "packed", "23.5", 17_500, 23.5),
    "full rows, min": Case("full-v1", "packed", "min", 14_000, 6.2),
    "scam rows, two a pass, padded": Case("scam-v1", "literal", "fill", 16_000),
}


def speed(here: Here) -> list[Command]:
    """Arms of one workload and layout at a time: measured, then profiled."""
    groups = list(dict.fromkeys((case.workload, case.layout) for case in CASES.values()))
    return [_bench(here, *group, profiled=looked) for looked in (False, True) for group in groups]


def _bench(here: Here, workload: str, layout: str, *, profiled: bool) -> Command:
    of = [one for one in CASES.values() if (one.workload, one.layout) == (workload, layout)]
    words = ["--model", here.of("llama-8b"), "--device", here.place.device, "--engines", "fused"]
    words += ["--workloads", workload, "--layouts", layout]
    words += ["--vary", f"memory.profile={','.join(one.profile for one in of)}"]
    words += ["--rows-per-update", here.pick("16", "2"), "--precision", here.pick("bf16", "fp32")]
    if profiled:
        words += ["--profile", str(PROFILED), "--profile-dir", str(here.work / "profiles")]
    else:
        words += ["--updates", here.pick("8", "1"), "--warmup", here.pick("3", "1")]
        words += ["--repeats", "1", "--out", str(here.work / "speed.jsonl")]
    name = f"speed_{workload.partition('-')[0]}" + ("_profiled" if profiled else "")
    return Command(name, (here.place.python, "-m", "glassloop.cli", "bench", *words))


def judge_speed(here: Here, _: dict[str, Ended]) -> Verdict:
    """Each case beside its marks; the profiles of those that miss them."""
    found = {key(arm.cell): arm for arm in arms(read(here.work / "speed.jsonl"))}
    numbers: dict[str, Any] = {}
    told, missed = [], []
    for name, case in CASES.items():
        arm = found.get((case.workload, case.layout, case.profile))
        if arm is None:
            return failed(f"{name}: no arm was measured, or its update 1 differs", **numbers)
        rate, gib = arm.tokens_per_s, peak_gib(arm.lines)
        numbers[name] = {"tokens_per_s": rate, "peak_gib": gib, "mark": case.tokens_s}
        told.append(f"{name} {rate:,.0f} (mark {case.tokens_s:,.0f})" + _within(gib, case.gib))
        if rate < case.tokens_s or (gib or 0.0) > (case.gib or float("inf")):
            missed.append(name)
            numbers[name]["profile"] = page_of(here.work / "profiles", case)
    return marked(here, not missed, f"tokens/s: {'; '.join(told)}", **numbers)


def key(cell: dict[str, Any]) -> tuple[str, str, str]:
    """Workload, layout and memory.profile of an arm."""
    varied = dict(one.split("=", 1) for one in cell["varied"])
    return cell["workload"], cell["layout"], varied.get("memory.profile", "")


def peak_gib(lines: tuple[dict[str, Any], ...]) -> float | None:
    """Most memory of the card that any of the lines allocated; None on a CPU."""
    known = [line["peak"]["allocated_gib"] for line in lines if line["peak"].get("allocated_gib")]
    return max(known, default=None)


def page_of(folder: Path, case: Case) -> list[str] | None:
    """The beginning of the page about a case's update; None if it was not profiled."""
    ends = f"{case.profile.replace('.', '-')}-update-{PROFILED}"  # as the command names folders
    for page in sorted(folder.glob("*/summary.md")):
        name = page.parent.name
        if case.workload in name and case.layout in name and name.endswith(ends):
            return page.read_text(encoding="utf-8").splitlines()[:PAGE_LINES]
    return None


def _within(gib: float | None, most: float | None) -> str:
    if gib is None:
        return ""
    return f" in {gib:.2f} GiB" + (f" (mark {most:g})" if most else "")


PARTS = {
    "speed": Part(420.0, "8B: tokens/s of full rows, three profiles, and of padded pairs",
                  speed, judge_speed),
}  # fmt: skip
