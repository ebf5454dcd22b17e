"""The parts of two_gpus.py that are judged by their speed.

The benchmark on one and two ranks, and other trainers beside it. No torch.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import two_gpus_runs as runs
from suite import Verdict, failed, judged
from two_gpus_parts import Asked, ended
from two_gpus_runs import Place

from glassloop.bench import matrix, processes
from glassloop.bench.results import append, arms, checked, read

PRECISION = (
    "bf16"  # on a CPU too: TRL trains adapters in bf16, which the marks for fp32 do not allow for
)
# Least rate of two ranks, as a share of twice that of one.
EFFICIENCY = {"full-v1": 0.95, "scam-v1": 0.90}

TOO_GOOD = 1.05  # above it the one-rank arm was disturbed, and the ratio is no measurement


def bench(place: Place, asked: Asked, until: float) -> dict[str, Verdict]:
    """The arms of `glassloop bench`.

    Engines on one and two ranks, each in its usual layout; their lines are kept in
    work/bench.jsonl.
    """
    spot = processes.Place(place.device, len(place.cards))
    common = dict(rows_per_update=asked.rows_per_update, model=place.model, precision=PRECISION)
    specs = [
        spec
        for engine in asked.engines
        for spec in matrix.specs_of(
            engines=[engine], workloads=asked.workloads,
            layouts=["packed" if engine == "fused" else "literal"], ranks=[1, 2], batches=[2],
            checkpointing=[True], place=spot, common=common | _updates_of(engine, place, asked),
        )
    ]  # fmt: skip
    lines: list[dict[str, Any]] = []
    for number, spec in enumerate(matrix.schedule(specs, 1)):
        left = until - time.monotonic()
        if left < 1:
            line = spec.about | {"failed": "no time was left"}
        else:
            line = processes.run_arm(spec, spot, place.work / "bench" / str(number), timeout_s=left)
        lines.append(line | {"check": checked(line, lines)})
        append(place.work / "bench.jsonl", lines[-1])
    return {
        f"scaling, {engine}, {rows}": _scaling(place, lines, engine, rows)
        for engine in asked.engines
        for rows in asked.workloads
    }


def _updates_of(engine: str, place: Place, asked: Asked) -> dict[str, int]:
    """How many updates an arm computes first, and how many are timed then.

    Rows of new lengths cost the first updates memory from CUDA and kernels from cuBLAS, as many
    milliseconds on two ranks as on one. On short rows `fused` would be timed in little else.
    """
    if engine != "fused" or place.device == "cpu":
        return {"warmup": 1, "updates": asked.bench_updates}
    return {"warmup": 4, "updates": max(asked.bench_updates, 12)}


def _scaling(place: Place, lines: list[dict[str, Any]], engine: str, rows: str) -> Verdict:
    """Rate of two ranks over twice that of one.

    On a CPU, whose cores the ranks share, only the results are judged.
    """
    mine = [
        line
        for line in lines
        if (line["cell"]["engine"], line["cell"]["workload"]) == (engine, rows)
        and not line["check_only"]
    ]
    numbers: dict[str, Any] = {f"{line['cell']['ranks']} rank(s)": of_line(line) for line in mine}
    rates = {arm.cell["ranks"]: arm.tokens_per_s for arm in arms(mine)}
    if len(rates) < 2:
        bad = [line for line in mine if line.get("check", {}).get("within") is False]
        return (
            judged(False, f"update 1 differs from the reference: {bad[0]['check']}", **numbers)
            if bad
            else failed("arms are missing", **numbers)
        )
    efficiency = rates[2] / (2 * rates[1])
    why = f"two ranks reach {efficiency:.0%} of twice one rank "
    why += f"({rates[2]:,.0f} and {rates[1]:,.0f} tokens/s)"
    if efficiency > 1:
        why += (
            "; above 100 %: the one-rank arm was slow, as a busy host makes it, so this says little"
        )
    if place.device == "cpu":
        return Verdict(
            "held",
            why + "; ranks share the cores, so no mark",
            numbers | {"efficiency": efficiency},
        )
    if efficiency > TOO_GOOD:
        return Verdict("failed", why, numbers | {"efficiency": efficiency})
    return judged(
        efficiency >= EFFICIENCY.get(rows, 0.0),
        why,
        **numbers,
        efficiency=efficiency,
        mark=EFFICIENCY.get(rows),
    )


def of_line(line: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a line of the benchmark."""
    names = (
        "failed",
        "check",
        "tokens_per_s",
        "update_s",
        "shares",
        "peak",
        "update_1",
        "rows_digest",
        "adapters",
    )
    return {name: line[name] for name in names if name in line}


def trl(place: Place, asked: Asked, until: float) -> dict[str, Verdict]:
    return _library(place, asked, until, "trl", "trl")


def unsloth(place: Place, asked: Asked, until: float) -> dict[str, Verdict]:
    return _library(place, asked, until, "unsloth", "unsloth-trainer")


def _library(
    place: Place, asked: Asked, until: float, library: str, peer: str
) -> dict[str, Verdict]:
    """Another trainer on two ranks under DDP, on the bench's rows.

    Only where it is installed, here or in `--python`.
    """
    pythons, name = dict(asked.pythons), f"{library} under DDP"
    if library not in pythons and importlib.util.find_spec(library) is None:
        why = f"{library} is not installed (--python {library}=/path/to/env/bin/python)"
        return {name: Verdict("left out", why, {})}
    if library in pythons and not Path(pythons[library]).is_file():
        why = f"--python {library}={pythons[library]}: there is no such interpreter"
        return {name: failed(why)}
    return {name: _peer(place, asked, until, peer)}


def _peer(place: Place, asked: Asked, until: float, peer: str) -> Verdict:
    out, timed = place.work / "bench.jsonl", max(1.0, until - time.monotonic())
    words = [
        place.python,
        "benchmarks/peers.py",
        "--peers",
        peer,
        "--workloads",
        ",".join(asked.workloads),
        "--ranks",
        "2",
    ]
    words += [
        "--model",
        place.model,
        "--precision",
        PRECISION,
        "--device",
        place.device,
        "--out",
        str(out),
        "--warmup",
        "1",
    ]
    words += [
        "--rows-per-update",
        str(asked.rows_per_update),
        "--updates",
        str(asked.bench_updates),
        "--timeout",
        f"{timed:.0f}",
    ]
    words += [word for name, path in asked.pythons for word in ("--python", f"{name}={path}")]
    one = runs.start(place, words, f"peer-{peer}", 2)
    code = one.wait(until)
    runs.end(one)
    lines = read(out) if out.exists() else []
    mine = {line["cell"]["workload"]: line for line in lines if line["cell"]["engine"] == peer}
    if not mine or any("failed" in line for line in mine.values()):
        why = next((line["failed"] for line in mine.values() if "failed" in line), ended(code))
        return failed(why[:300], one, **{rows: of_line(line) for rows, line in mine.items()})
    numbers: dict[str, Any] = {}
    for rows, line in mine.items():
        rate = line["tokens_per_s"]["real"]
        beside = {
            f"{engine} / {peer}": other["tokens_per_s"]["real"] / rate
            for engine in asked.engines
            for other in lines
            if (other["cell"]["engine"], other["cell"]["workload"], other["cell"]["ranks"])
            == (engine, rows, 2)
            and "failed" not in other
        }
        numbers[rows] = of_line(line) | {"beside": beside}
    within = all(line["check"]["within"] for line in mine.values())
    told = ", ".join(
        f"{rows} {line['tokens_per_s']['real']:,.0f} tokens/s" for rows, line in mine.items()
    )
    ratios = ", ".join(
        f"{what} {ratio:.2f} on {rows}"
        for rows, one in numbers.items()
        for what, ratio in one["beside"].items()
    )
    return judged(
        within,
        f"{told}; {ratios or 'nothing of glassloop to set beside it'}"
        + ("" if within else "; update 1 DIFFERS"),
        **numbers,
    )
