"""The part of two_gpus.py that kills a rank and resumes. No torch."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import two_gpus_runs as runs
from suite import Verdict, failed, judged
from two_gpus_parts import Asked, ended
from two_gpus_runs import Place

from glassloop.loop.watchdog import PATIENCE_S

# A rank whose partner was killed needs its watchdog's patience and the time to leave the card.
RANK_ENDS_S = PATIENCE_S + 5.0
LAUNCHER_ENDS_S = 2 * PATIENCE_S
# The killed run saves checkpoints at 4 and 8, and is killed after update 6.
KILL = {"updates": 12, "every": 4, "at": 6}


def killed(place: Place, asked: Asked, until: float) -> dict[str, Verdict]:
    """Kill rank 1 of a deterministic run, resume it, and compare with the same run unkilled.

    An update has half of the recipe's rows, for time.
    """
    fixed = [
        "batch.rows_per_update=8",
        f"schedule.updates={KILL['updates']}",
        f"checkpoint.every_updates={KILL['every']}",
        "checkpoint.keep=100",
        "execution.deterministic=true",
    ]
    whole, folder = place.work / "runs" / "whole", place.work / "runs" / "killed"
    before = runs.train(place, "whole", runs.recipe(place, "whole", *fixed))
    code = before.wait(until)
    runs.end(before)
    if code != 0:
        return {
            "one rank killed": failed(f"the run that nobody kills: {ended(code)}", before),
            "exact resume": failed("nothing to resume"),
        }
    one = runs.train(place, "killed", runs.recipe(place, "killed", *fixed))
    if (
        not one.reaches(lambda: len(runs.updates_of(folder)) >= KILL["at"], until)
        or one.process.poll() is not None
    ):
        runs.end(one)
        return {
            "one rank killed": failed("it did not get to the kill", one),
            "exact resume": failed("nothing to resume"),
        }
    pids = [
        json.loads((folder / "ranks" / f"rank{rank}.json").read_text())["pid"] for rank in range(2)
    ]
    saved = runs.checkpoint(folder)
    os.kill(pids[1], signal.SIGKILL)
    at = time.monotonic()
    tick = runs.tree(pids[0])
    one.reaches(lambda: runs.tree(pids[0]).get(pids[0]) != tick.get(pids[0]), until)
    rank_s = time.monotonic() - at
    code = one.wait(until)
    launcher_s = time.monotonic() - at
    runs.end(one)
    runs.kill(tick)  # should the rank have outlived its launcher
    left = runs.checkpoint(folder)
    untouched = saved is not None and saved == left
    good = (
        code not in (0, None)
        and untouched
        and rank_s <= RANK_ENDS_S
        and launcher_s <= LAUNCHER_ENDS_S
    )
    why = f"the other rank ended {rank_s:.1f} s later, the launcher {launcher_s:.1f} s, "
    why += f"{ended(code)}; {left[0] if left else 'no checkpoint'} "
    why += "untouched" if untouched else "NOT AS IT WAS"
    numbers = {
        "rank_ended_s": rank_s,
        "launcher_ended_s": launcher_s,
        "exit_code": code,
        "marks_s": [RANK_ENDS_S, LAUNCHER_ENDS_S],
    }
    numbers |= {
        "killed_after_update": max(runs.updates_of(folder)),
        "checkpoint_before": saved,
        "checkpoint_after": left,
        "said": one.said,
    }
    verdict = judged(good, why, **numbers)
    back = runs.train(place, "resumed", ["--resume", str(folder)])
    code = back.wait(until)
    runs.end(back)
    return {"one rank killed": verdict, "exact resume": same_again(folder, whole, code, back)}


def same_again(folder: Path, whole: Path, code: int | None, one: runs.Started) -> Verdict:
    """The resumed run's updates beside those of the run that nobody killed.

    Equal to the last bit.
    """
    ours, theirs = runs.updates_of(folder), runs.updates_of(whole)
    again = [update for update, line in ours.items() if line["attempt"] > 1]
    if code != 0 or not again:
        return failed(f"the resumed run: {ended(code)}", one)
    fields = ("loss_nats", "grad_norm_pre_clip", "lr")
    other = [
        update
        for update in theirs
        if update not in ours or any(ours[update][name] != theirs[update][name] for name in fields)
    ]
    loss = runs.apart(ours, theirs, "loss_nats")
    why = f"updates {again[0]} to {again[-1]} were done again; "
    why += (
        f"updates {other} differ from the uninterrupted run"
        if other
        else "losses and norms are those of the uninterrupted run, bit for bit"
    )
    return judged(
        not other, why, done_again=again, differing=other, loss_off_worst=max(loss.values())
    )
