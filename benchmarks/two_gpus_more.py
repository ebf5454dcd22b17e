"""Parts of two_gpus.py about one run or two: resumed, replayed, stalled, side by side, packed.

Judged by results, but for the balance of packed rows. No torch.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from typing import Any

import two_gpus_runs as runs
from suite import Verdict, failed, judged
from two_gpus_killed import same_again
from two_gpus_parts import Asked, ended
from two_gpus_runs import Place

EXACT = {"updates": 8, "every": 4}
BAD_LR = 1e18  # the second update then has no finite loss
STALL = {"after": 3, "timeout_s": 20}
STALL_ENDS_S = 15.0  # beyond the timeout: five for the other's answer, the rest to leave the card
UNEVEN = 0.05  # of a rank's mean load: the most that the fullest rank may have above it


def fused_exact(place: Place, asked: Asked, until: float) -> dict[str, Verdict]:
    """`fused` on two ranks in deterministic mode, resumed from its middle checkpoint."""
    title, whole = "fused, exact resume", place.work / "runs" / "fused-whole"
    words = [
        "execution.engine=fused",
        "execution.layout=packed",
        "execution.deterministic=true",
        "batch.rows_per_update=8",
        f"schedule.updates={EXACT['updates']}",
        f"checkpoint.every_updates={EXACT['every']}",
        "checkpoint.keep=100",
    ]
    one = runs.train(place, whole.name, runs.recipe(place, whole.name, *words))
    code = one.wait(until)
    runs.end(one)
    if code != 0:
        return {title: failed(f"the run that nobody stops: {ended(code)}", one)}
    again = whole.with_name("fused-again")
    shutil.copytree(whole, again, ignore=shutil.ignore_patterns("run.lock", "ranks"))
    resume = ["--resume", str(again), "--at", str(EXACT["every"])]
    back = runs.train(place, again.name, resume)
    code = back.wait(until)
    runs.end(back)
    verdict = same_again(again, whole, code, back)
    if verdict.verdict == "failed":
        return {title: verdict}
    last = f"checkpoints/update_{EXACT['updates']:06d}"
    names = ("adapter_model.safetensors", "optimizer.safetensors")
    same = all(
        (again / last / name).read_bytes() == (whole / last / name).read_bytes() for name in names
    )
    held = verdict.verdict == "held" and same
    why = verdict.why + ("; adapter and optimizer too" if same else "; THE STATES DIFFER")
    return {title: judged(held, why, **verdict.numbers, states_equal=same)}


def bisect(place: Place, asked: Asked, until: float) -> dict[str, Verdict]:
    """A bad update that two ranks recorded, replayed and walked through by one process."""
    title, folder = "bisect of a bad update", place.work / "runs" / "bad"
    words = [
        "execution.deterministic=true", "batch.rows_per_update=8", "schedule.updates=4",
        "schedule.warmup_updates=1", f"optimizer.lr={BAD_LR:g}", "checkpoint.every_updates=1",
    ]  # fmt: skip
    one = runs.train(place, folder.name, runs.recipe(place, folder.name, *words))
    code = one.wait(until)
    runs.end(one)
    bad = [
        line["update"]
        for line in runs.lines_of(folder, "metrics.jsonl")
        if line["action"] == "skipped"
    ]
    if not bad:
        return {title: failed(f"no update was skipped as not finite; {ended(code)}", one)}
    words = [place.python, "-m", "glassloop.cli", "replay", str(folder), "--update", str(bad[0])]
    walk = runs.start(place, [*words, "--bisect", "--json"], "bisect", 1)
    code = walk.wait(until)
    runs.end(walk)
    try:
        found = runs.json_in(walk.log)
        places = found["bisection"]
        ranks = [part["name"] for part in places["ranks"]]
        exact = found["bit_for_bit"]
    except (ValueError, KeyError, TypeError) as error:
        return {title: failed(f"{ended(code)}; {type(error).__name__}: {error}", walk)}
    layer = (places["layer"] or {}).get("message")
    held = exact and ranks == ["rank 0", "rank 1"] and bool(layer)
    why = f"update {bad[0]} of two ranks, on one: {'bit for bit' if exact else 'NOT the same'}; "
    why += layer or "no layer was found"
    numbers = {"update": bad[0], "origin": found["origin"], "ranks": ranks, "layer": layer}
    return {title: judged(held, why, **numbers, bit_for_bit=exact)}


def stalled(place: Place, asked: Asked, until: float) -> dict[str, Verdict]:
    """Rank 1 is stopped (SIGSTOP) for longer than the watchdog waits."""
    title, folder = "one rank stalled", place.work / "runs" / "stalled"
    words = [
        "batch.rows_per_update=8",
        "schedule.updates=2000",
        "checkpoint.every_updates=2",
        f"execution.collective_timeout_s={STALL['timeout_s']}",
    ]
    one = runs.train(place, folder.name, runs.recipe(place, folder.name, *words))
    if not one.reaches(lambda: len(runs.updates_of(folder)) >= STALL["after"], until):
        runs.end(one)
        return {title: failed("it did not get to the stall", one)}
    pids = [
        json.loads((folder / "ranks" / f"rank{rank}.json").read_text())["pid"] for rank in range(2)
    ]
    known = runs.tree(one.process.pid)
    os.kill(pids[1], signal.SIGSTOP)
    at, saved = time.monotonic(), runs.checkpoint(folder)
    one.reaches(lambda: runs.tree(pids[0]).get(pids[0]) != known[pids[0]], until)
    took = time.monotonic() - at
    os.kill(pids[1], signal.SIGCONT)  # or its launcher waits for it for 30 s
    code = one.wait(until)
    runs.end(one)
    runs.kill(known)  # should a rank have outlived its launcher
    said = one.log.read_text(encoding="utf-8", errors="replace")
    begins = ("Stuck in collective", "The ranks disagree about collective")
    sentence = next((line for line in said.split(". ") if line.strip().startswith(begins)), "")
    sentence = sentence.strip().partition("\n")[0]
    named = bool(sentence) and "entered by rank 0" in sentence
    untouched = saved is not None and runs.checkpoint(folder) == saved
    most = STALL["timeout_s"] + STALL_ENDS_S
    held = code not in (0, None) and named and untouched and took <= most
    why = f"the other rank ended after {took:.1f} s, {ended(code)}: {sentence or 'NONE IS NAMED'}"
    why += "" if untouched else "; the checkpoint is NOT AS IT WAS"
    return {title: judged(held, why, ended_s=took, most_s=most, exit_code=code, said=one.said)}


def two_runs(place: Place, asked: Asked, until: float) -> dict[str, Verdict]:
    """Two runs at once, one a card: alike, they compute the same."""
    title = "two runs at once"
    spots = [replace(place, cards=(card,)) for card in place.cards] or [place, place]
    started = []
    for number, spot in enumerate(spots):
        words = [
            "batch.ranks=1",
            "batch.rows_per_update=8",
            f"schedule.updates={asked.first}",
            "checkpoint.every_updates=null",
            "execution.deterministic=true",
        ]
        name = f"beside-{number}"
        started.append(runs.train(spot, name, runs.recipe(spot, name, *words), ranks=1))
    codes = [one.wait(until) for one in started]
    for one in started:
        runs.end(one)
    if any(code != 0 for code in codes):
        bad = next(one for one, code in zip(started, codes, strict=True) if code != 0)
        return {title: failed(f"{[ended(code) for code in codes]}", bad)}
    a, b = (runs.updates_of(place.work / "runs" / f"beside-{number}") for number in range(2))
    fields = ("loss_nats", "grad_norm_pre_clip")
    other = [u for u in a if u not in b or any(a[u][name] != b[u][name] for name in fields)]
    why = f"{len(a)} updates each; " + (f"updates {other} DIFFER" if other else "bit for bit alike")
    numbers: dict[str, Any] = {"differing": other, "speed": [runs.speed(a), runs.speed(b)]}
    return {title: judged(not other and len(a) == asked.first, why, **numbers)}


def packed(place: Place, asked: Asked, until: float) -> dict[str, Verdict]:
    """Packed rows over two ranks: tokens of each, and who waits for whom."""
    title, folder = "packed rows, balance", place.work / "runs" / "packed"
    words = [
        "execution.engine=fused",
        "execution.layout=packed",
        f"schedule.updates={max(asked.first, 4)}",
        "checkpoint.every_updates=null",
    ]
    one = runs.train(place, folder.name, runs.recipe(place, folder.name, *words))
    code = one.wait(until)
    runs.end(one)
    updates = runs.updates_of(folder)
    if code != 0 or not updates:
        return {title: failed(ended(code), one)}
    uneven = [most_above_mean(line["rank_real_tokens"]) for line in updates.values()]
    speed = runs.speed(updates)
    why = f"the fuller rank has at most {max(uneven):.1%} more tokens than the mean"
    why += f" (mean {sum(uneven) / len(uneven):.1%}); rank 0 waits {speed['waiting_share']:.1%}"
    tokens = [line["rank_real_tokens"] for line in updates.values()]
    numbers = {"mark": UNEVEN, "uneven": uneven, "rank_real_tokens": tokens, **speed}
    return {title: judged(sum(uneven) / len(uneven) <= UNEVEN, why, **numbers)}


def most_above_mean(tokens: list[int]) -> float:
    """By which share of the mean the fullest rank lies above it."""
    return max(tokens) * len(tokens) / sum(tokens) - 1
