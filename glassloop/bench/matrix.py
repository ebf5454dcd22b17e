"""The benchmark's matrix: arms and their order, in fresh processes.

No torch.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from glassloop.bench.processes import ARM_TIMEOUT_S, Place, Start, run_arm, run_together
from glassloop.bench.results import REFERENCE_ENGINE, SAME_WORK, append, checked, is_reference
from glassloop.bench.spec import Spec
from glassloop.engines.unsloth_checks import problems


def specs_of(
    *,
    engines: Sequence[str],
    workloads: Sequence[str],
    layouts: Sequence[str],
    ranks: Sequence[int],
    batches: Sequence[int],
    checkpointing: Sequence[bool],
    place: Place,
    common: dict[str, Any],
    varied: Sequence[tuple[str, ...]] = ((),),
) -> list[Spec]:
    """Every combination, once.

    `common`: further fields of all specs. `varied`: see Spec; fields of memory are for fused alone.
    """
    combinations = itertools.product(
        workloads, engines, varied, layouts, batches, checkpointing, ranks
    )
    specs = (
        Spec(
            engine=engine,
            workload=workload,
            layout=layout,
            ranks=count,
            batch=batch,
            checkpointing=recompute,
            device=place.device,
            backend=place.backend(count),
            varied=tuple(
                field for field in fields if engine == "fused" or not field.startswith("memory.")
            ),
            **common,
        )
        for workload, engine, fields, layout, batch, recompute, count in combinations
    )
    return list(dict.fromkeys(specs))


def schedule(specs: Sequence[Spec], repeats: int) -> list[Spec]:
    """Order the runs: references first, then arms, each repeat begins with another.

    If no arm is the reference of some others (the reference engine, literal, one rank), a short
    one is put before them: it serves their check.
    """
    first: list[Spec] = []
    for spec in specs:
        if not any(is_reference(one.cell) and _same_work(one, spec) for one in [*specs, *first]):
            own = dict(
                engine=REFERENCE_ENGINE,
                layout="literal",
                ranks=1,
                backend="auto",
                updates=1,
                warmup=1,
                turns=min(spec.turns, 1),
                varied=(),
                check_only=True,
            )
            first.append(replace(spec, **own))
    # Stable: references lead in the first repeat.
    arms = sorted(specs, key=lambda spec: not is_reference(spec.cell))
    turns = [
        replace(arms[(place + repeat) % len(arms)], repeat=repeat)
        for repeat in range(repeats)
        for place in range(len(arms))
    ]
    return [*first, *turns]


def _same_work(one: Spec, other: Spec) -> bool:
    return all(one.cell[name] == other.cell[name] for name in SAME_WORK)


def unable(spec: Spec, pythons: Mapping[str, str]) -> str | None:
    """Return why an arm cannot start here; None if it can."""
    if (
        spec.engine == "unsloth"
        and spec.engine not in pythons
        and (found := problems(on_cuda=spec.device == "cuda"))
    ):
        return "; ".join(found)
    return None


def run_matrix(
    order: Sequence[Spec],
    place: Place,
    folder: Path,
    out: Path,
    say: Callable[[str], None],
    pythons: Mapping[str, str],
) -> list[dict[str, Any]]:
    """Run every spec, and return the lines.

    Each line goes to `out` as soon as it is there, with its check.

    Args:
        pythons: engine -> the interpreter of its arms, where that is not this one.
    """
    lines: list[dict[str, Any]] = []
    for number, spec in enumerate(order, start=1):
        began = time.monotonic()
        if why := unable(spec, pythons):
            line = left_out(spec, why)
        else:
            line = run_arm(
                spec,
                place,
                folder / f"arm-{number}",
                python=pythons.get(spec.engine, sys.executable),
            )
        keep(line, lines, out)
        say(f"[{number}/{len(order)}] {spec.name}: {told(line)} ({time.monotonic() - began:.0f} s)")
    return lines


def run_groups(
    groups: Sequence[Sequence[Start]],
    place: Place,
    out: Path,
    say: Callable[[str], None],
    known: Sequence[dict[str, Any]] = (),
    *,
    timeout_s: float = ARM_TIMEOUT_S,
    first_alone: bool = False,
) -> list[dict[str, Any]]:
    """Run groups of arms that take turns, one group after the other.

    Lines and `out` are as with run_matrix.

    Args:
        known: lines that may hold a group's reference. timeout_s, first_alone: see run_together.
    """
    lines: list[dict[str, Any]] = []
    for number, starts in enumerate(groups, start=1):
        began = time.monotonic()
        found = run_together(starts, place, timeout_s, first_alone=first_alone)
        for line in sorted(found, key=lambda line: not is_reference(line["cell"])):
            keep(line, lines, out, known)
            say(f"[group {number}/{len(groups)}] {line['name']}: {told(line)}")
        say(f"[group {number}/{len(groups)}] {time.monotonic() - began:.0f} s")
    return lines


def run_in_turns(
    order: Sequence[Spec],
    place: Place,
    folder: Path,
    out: Path,
    say: Callable[[str], None],
    pythons: Mapping[str, str],
) -> list[dict[str, Any]]:
    """Run the matrix with a workload's arms loaded at once, in turns."""
    lines: list[dict[str, Any]] = []
    groups: dict[str, list[Start]] = {}
    for number, spec in enumerate(order, start=1):
        if why := unable(spec, pythons):
            keep(left_out(spec, why), lines, out)
            say(f"{spec.name}: {told(lines[-1])}")
            continue
        python = pythons.get(spec.engine, sys.executable)
        groups.setdefault(spec.workload, []).append(
            Start.of_ours(spec, folder / f"arm-{number}", python)
        )
    return lines + run_groups(list(groups.values()), place, out, say, first_alone=True)


def left_out(spec: Spec, why: str) -> dict[str, Any]:
    """The line of an arm that is not started."""
    return spec.about | {"failed": why, "left_out": True}


def keep(
    line: dict[str, Any],
    lines: list[dict[str, Any]],
    out: Path,
    known: Sequence[dict[str, Any]] = (),
) -> None:
    """Add a line with its check to `lines` and to the file."""
    line["check"] = checked(line, [*known, *lines])
    lines.append(line)
    append(out, line)


def told(line: dict[str, Any]) -> str:
    """A line in a few words."""
    if "failed" in line:
        return f"{'left out' if line.get('left_out') else 'failed'}: {line['failed']}"
    check, speed = line["check"], f"{line['tokens_per_s']['real']:,.0f} real tokens/s"
    if check["within"]:
        return speed
    if check["within"] is None:
        return f"not shown: {check['why']}"
    return (
        f"CHECK FAILED: loss off by {check['loss_off']}, norm by {check['norm_off']} "
        f"(at most {check['tolerance']})"
    )
