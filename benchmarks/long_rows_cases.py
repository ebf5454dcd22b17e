"""Cases of long_rows.py in one process: the base is loaded once.

    python benchmarks/long_rows_cases.py ASKED.json
    torchrun --nproc-per-node 2 benchmarks/long_rows_cases.py ASKED.json

ASKED.json has the settings, the cases, and the file that takes a line as each case ends. Before
each case torch is told how much of the card there is: the card's GiB less a CUDA context. So tiers
are chosen as on that card, and what does not fit runs out of memory. Speeds are those of the large
card.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lines import begin_ranks, line_writer
from long_rows_bench import Bench, release

from glassloop.disk.environment import environment
from glassloop.formula.dist import gather_objects, leave, reduce_gradients
from glassloop.loop.launch import grow_segments
from glassloop.predict.cards import CONTEXT_GIB
from glassloop.predict.choice import describe
from glassloop.predict.host import spare_bytes
from glassloop.predict.ledger import ledger_of
from glassloop.predict.longest import longest_row, row_of
from glassloop.predict.terms import GIB
from glassloop.predict.tiers import Tiers

SHORTER = (0.96, 0.9)  # of a predicted length that ran out


def case(
    bench: Bench, profile: str, tokens: int, host_gib: float | None, seconds: float
) -> dict[str, Any]:
    """Train one length: tiers, seconds, GiB; `error` if it did not train."""
    started = time.perf_counter()
    cuda = bench.device.type == "cuda"
    line: dict[str, Any] = {"tokens": tokens, "trained": False}
    try:
        tiers = bench.choose(profile, tokens, bench.host_bytes(host_gib))
        work = replace(row_of(bench.work, tokens), tiers=tiers, profile=profile)
        ledger = ledger_of(bench.shapes, work, "fused")
        line |= {
            "tiers": asdict(tiers),
            "words": describe(tiers, bench.shapes.layers),
            "predicted_gib": ledger.peak_bytes / GIB,
            "host_gib": bench.engine.host.bytes / GIB,
            "prepared_s": time.perf_counter() - started,
        }
        p, times = bench.pass_of(tokens), []
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        while more_updates(times, seconds):
            took, line["loss_nats"], line["grad_norm"] = bench.update(p)
            times.append(took)
        line |= {"trained": True, "updates_s": times, "tokens_per_s": tokens / min(times)}
        if cuda:
            line["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
            line["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    except (torch.OutOfMemoryError, ValueError) as error:
        line["error"] = str(error).partition("\n")[0][:300]
    release()
    return line | {"case_s": time.perf_counter() - started}


def more_updates(times: list[float], seconds: float) -> bool:
    """Whether an update is to follow: rank 0's answer on all ranks.

    Up to four; at least two of short ones, since the first compiles kernels.
    """
    more = not times or (len(times) == 1 and times[0] < seconds)
    more = more or (len(times) < 4 and sum(times) + times[-1] < seconds)
    return bool(gather_objects(more)[0])


def longest_of(bench: Bench, profile: str, host_gib: float | None) -> list[int]:
    """The predicted longest row, and shorter ones in case it runs out."""
    has = bench.host_bytes(host_gib) / GIB
    work = replace(bench.work, profile=profile, host_gib=has)
    found = longest_row(bench.shapes, work, bench.budget).tokens
    return [found, *(int(found * part) // 256 * 256 for part in SHORTER)]


# Rows of a pass: as full as a usual maximum, and as short as phone calls.
WORKLOADS = {"full": (2048,) * 8, "short": (424,) * 16}


def short_rows(bench: Bench, workload: str, tokens: int, seconds: float) -> dict[str, Any]:
    """Seconds of short rows' passes in turns: tiers by their longest row, and without.

    `tokens`: of each row; 0: those of the workload. A choice by the longest row must cost nothing.
    """
    lengths = tuple(tokens or length for length in WORKLOADS[workload])
    p, started, host = bench.pass_of(*lengths), time.perf_counter(), bench.host_bytes(None)
    times: dict[str, list[float]] = {"longest": [], "unknown": []}
    tiers: dict[str, Any] = {}
    while time.perf_counter() - started < seconds or len(times["unknown"]) < 2:
        for name, longest in (("longest", max(lengths)), ("unknown", 0)):
            tiers[name] = asdict(bench.choose("fill", sum(lengths), host, longest))
            bench.update(p)  # what a change of tiers allocates anew
            times[name].append(min(bench.update(p)[0] for _ in range(3)))
    best = {name: min(taken) for name, taken in times.items()}
    return {
        "workload": workload,
        "tiers": tiers,
        "same_tiers": tiers["longest"] == tiers["unknown"],
        "updates_s": times,
        "tokens_per_s": sum(lengths) / best["longest"],
        "ratio": best["unknown"] / best["longest"],
    }


def compared(bench: Bench, tokens: int) -> list[dict[str, Any]]:
    """Seconds, GiB and gradient of one row by every tier.

    Its gradient is compared with that of the whole pass and everything on the host, whose second
    turn says what is noise.
    """
    found, p, first = [], bench.pass_of(tokens), torch.empty(0)
    streamed = bench.engine.tiers.streamed
    for tiers in (
        Tiers(1, "all", streamed=streamed),
        Tiers(1, "all", streamed=streamed),
        Tiers(0, "all", streamed=streamed, chunk=8192),
        Tiers(0, "attention", streamed=streamed, chunk=8192),
        Tiers(0, "inputs", streamed=streamed, chunk=8192),
        Tiers(0, "inputs", streamed=streamed, chunk=2048),
        Tiers(1, "inputs", streamed=streamed),
    ):
        bench.engine.use_tiers(Tiers(1, streamed=streamed))
        bench.engine.make_room(tiers, tokens)
        bench.engine.use_tiers(tiers)
        release()
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(2):
            started = time.perf_counter()
            bench.adapters.zero_grad()
            loss_sum, _ = bench.engine(p)
            (loss_sum / p.supervised_tokens).backward()
            grad = bench.adapters.grad.cpu()
            times.append(time.perf_counter() - started)
        first = first if len(first) else grad.clone()
        line: dict[str, Any] = {"tokens": tokens, "tiers": asdict(tiers), "seconds": times}
        line["loss_nats"] = loss_sum.item() / p.supervised_tokens
        line["apart"] = float((grad - first).norm() / first.norm())
        if bench.device.type == "cuda":
            line["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        found.append(line)
    return found


def shared(bench: Bench, tokens: int) -> dict[str, Any]:
    """How far a shared pass's gradient is from that of a whole one.

    The second whole one says what is noise.
    """
    found: dict[str, torch.Tensor] = {}
    streamed = bench.engine.tiers.streamed
    bench.engine.use_tiers(Tiers(0, streamed=streamed))
    for name, whole in (("whole", True), ("again", True), ("shared", False)):
        bench.adapters.zero_grad()
        p = bench.pass_of(tokens, whole=whole)
        (bench.engine(p)[0] / tokens).backward()
        if not whole:
            reduce_gradients(bench.adapters.grad)
        found[name] = bench.adapters.grad.cpu()
    truth = found["whole"]
    off = {name: float((found[name] - truth).norm() / truth.norm()) for name in ("again", "shared")}
    return {"tokens": tokens, "noise": off["again"], "apart": off["shared"]}


def lines_of(bench: Bench, one: dict[str, Any], asked: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of one case."""
    if one["kind"] == "compare":
        return compared(bench, one["tokens"])
    if one["kind"] == "shared":
        return [shared(bench, one["tokens"])]
    gib = one["card_gb"] * 23.5 / 24 - CONTEXT_GIB
    bench.shrink(gib)
    about = one | {"budget_gib": gib}
    if one["kind"] == "short":
        return [about | short_rows(bench, one["workload"], one["tokens"], asked["seconds"])]
    found, host = [], asked["host_gib"]
    longest = one["asked"] == "longest"
    tried = longest_of(bench, one["profile"], host) if longest else [one["asked"]]
    for tokens in tried:
        found.append(about | case(bench, one["profile"], int(tokens), host, asked["seconds"]))
        if found[-1]["trained"]:
            break
    return found


def main() -> int:
    asked = json.loads(Path(sys.argv[1]).read_text())
    share = (0, 1)
    device = torch.device(asked["device"], 0) if asked["device"] == "cuda" else torch.device("cpu")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        rank, ranks, device = begin_ranks()
        share = (rank, ranks)
    say = line_writer(Path(asked["out"]), fresh=False, speaks=share[0] == 0)
    grow_segments()
    started = time.perf_counter()
    bench = Bench(asked["model"], asked["r"], asked["base"], device, share)
    say(
        kind="environment",
        **environment(sys.argv),
        ranks=share[1],
        host_spare_gib=spare_bytes() / GIB,
        memlock_bytes=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        load_s=time.perf_counter() - started,
        notes=bench.pages.notes,
    )
    for one in asked["cases"]:
        for line in lines_of(bench, one, asked):
            say(**one, **{name: value for name, value in line.items() if name not in one})
        say(kind="done", case=one)
    leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
