"""Parts that run one after the other into one JSON, and what is said of each.

A part that fails does not stop the others. The JSON is written anew after every part. No torch.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import two_gpus_runs as runs
from two_gpus_runs import Place

MACHINE_S = 90.0
Stages = Sequence[tuple[float, Sequence[str]]]  # seconds that each may take, names of its parts


@dataclass(frozen=True)
class Verdict:
    """What a part found.

    verdict: held | missed (measured, and below its mark) | failed (not measured) | left out. why:
    one line. numbers: what was measured.
    """

    verdict: str
    why: str
    numbers: dict[str, Any]


def failed(why: str, one: runs.Started | None = None, /, **numbers: Any) -> Verdict:
    return Verdict("failed", why, numbers | ({} if one is None else {"said": one.said}))


def judged(held: bool, why: str, /, **numbers: Any) -> Verdict:
    return Verdict("held" if held else "missed", why, numbers)


def run_stages(
    stages: Stages,
    run: Callable[[str, float], dict[str, Verdict]],
    chosen: Sequence[str],
    last: float,
    written: Callable[[dict[str, dict[str, Any]]], None],
) -> dict[str, dict[str, Any]]:
    """Run the chosen parts. Returns title -> verdict, in order, as plain values.

    Args:
        stages: parts of one stage run side by side.
        run: runs the part of a name until a time.monotonic().
        last: time.monotonic() at which all must be over.
        written: called with what there is after each part.
    """
    found: dict[str, dict[str, Any]] = {}
    lock = threading.Lock()
    for limit_s, names in stages:
        if not (mine := [name for name in names if name in chosen]):
            continue
        began = time.monotonic()
        until = min(began + limit_s, last)

        def one(name: str, until: float = until, began: float = began) -> None:
            verdicts = _run(run, name, until)
            took = {"part": name, "stage_s": round(time.monotonic() - began, 1)}
            with lock:
                found.update({title: vars(told) | took for title, told in verdicts.items()})
                written(found)
                for title in verdicts:
                    print(line_of(title, found[title]), flush=True)

        others = [threading.Thread(target=one, args=(name,), daemon=True) for name in mine[1:]]
        for thread in others:
            thread.start()
        one(mine[0])  # here: Ctrl-C and SIGTERM reach it
        for thread in others:
            while thread.is_alive():
                thread.join(0.2)
    return found


def _run(
    run: Callable[[str, float], dict[str, Verdict]], name: str, until: float
) -> dict[str, Verdict]:
    """Do one part; whatever it raises is its own failure."""
    if time.monotonic() >= until - 1:
        return {name: failed("no time was left (--minutes)")}
    try:
        return run(name, until)
    except Exception as error:  # any fault of a part: the others run, and the JSON says it
        return {name: failed(f"{type(error).__name__}: {error}"[:600])}


def stamped(found: dict[str, Any], commit: str | None) -> dict[str, Any]:
    """Verdicts with the commit that they are of."""
    return {title: verdict | {"commit": commit} for title, verdict in found.items()}


def earlier(out: Path, machine: dict[str, Any], chosen: Sequence[str]) -> dict[str, Any]:
    """Read the verdicts of other parts from a file of results.

    Raises ValueError if the file is of other cards, or is not one of ours.
    """
    if not out.exists():
        return {}
    try:
        told = json.loads(out.read_text(encoding="utf-8"))
        same = card_name(told["machine"]) == card_name(machine)
        kept = {title: one for title, one in told["parts"].items() if one["part"] not in chosen}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--add: {out} is no file of results ({type(error).__name__}); name another --out"
        ) from None
    if not same:
        raise ValueError(f"--add: {out} is of other cards; name another --out")
    return kept


def write(out: Path, about: dict[str, Any], found: dict[str, Any], began: float) -> None:
    """The JSON, whole at any time, without the name of the user whose folders the logs' ends speak
    of.
    """
    text = json.dumps(
        about | {"seconds": round(time.monotonic() - began, 1), "parts": found},
        indent=1,
        default=str,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".tmp")
    home = str(Path.home())
    temporary.write_text(
        (text.replace(home, "~") if len(home) > 1 else text) + "\n", encoding="utf-8"
    )
    os.replace(temporary, out)


def machine_of(place: Place, cards: int) -> tuple[dict[str, Any], str]:
    """What two_gpus_machine.py says, and why nothing can be run here ("" where it can)."""
    script = str(Path(__file__).with_name("two_gpus_machine.py"))
    try:
        done = subprocess.run(
            [place.python, script, place.device, str(cards)],
            env=place.environment(cards),
            capture_output=True,
            text=True,
            timeout=MACHINE_S,
            check=True,
        )
        machine = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {}, f"the cards did not answer within {MACHINE_S:g} s; `glassloop doctor` says more"
    except (subprocess.CalledProcessError, ValueError, IndexError) as error:
        return {}, f"{error}: {getattr(error, 'stderr', '')}"[-800:]
    if place.device == "cuda" and machine["cards_seen"] < cards:
        return (
            machine,
            f"torch sees {machine['cards_seen']} CUDA devices, and this needs {cards}; --device "
            "cpu --model random:tiny tests the script",
        )
    return machine, ""


def refused(why: str) -> int:
    print(f"refused: {why}", file=sys.stderr)
    return 2


def card_name(machine: dict[str, Any]) -> str:
    """A card's name as part of a file's."""
    name = machine["gpus"][0]["name"].lower().removeprefix("nvidia ") if machine["gpus"] else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def line_of(title: str, verdict: dict[str, Any]) -> str:
    return f"{verdict['verdict']:<8}  {title:<28}  {verdict['why']}"
