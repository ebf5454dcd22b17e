"""Everything that two cards are to show, one part after the other, into one JSON.

See two_gpus.sh, which starts it.

Each part has its own time limit, and one that fails does not stop the others. Verdicts: held,
missed (measured, and below its mark), failed (not measured), left out (a peer that is not
installed). The JSON is written anew after every part.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import two_gpus_killed
import two_gpus_parts as parts
import two_gpus_speed
from two_gpus_parts import Asked, Verdict
from two_gpus_runs import ROOT, RUNNING, Place, end, write_rows

SCHEMA = 1
ROWS = 600
MACHINE_S = 90.0
# Stages, in order: parts of one stage run side by side, which only those may that are judged by
# results and not by their speed. Seconds: the limit.
STAGES: tuple[tuple[float, tuple[str, ...]], ...] = (
    (300.0, ("peft",)),
    (240.0, ("one_rank", "verify", "killed")),
    (90.0, ("ddp",)),
    (150.0, ("fused",)),
    (330.0, ("bench",)),
    (300.0, ("peers",)),
)
OWN_FILES: dict[str, parts.Part] = {
    "killed": two_gpus_killed.killed,
    "bench": two_gpus_speed.bench,
    "peers": two_gpus_speed.peers,
}
PARTS: dict[str, parts.Part] = {
    name: OWN_FILES.get(name) or getattr(parts, name) for _, names in STAGES for name in names
}


def main(argv: list[str]) -> int:
    """Exit code 0: all parts held (or were left out); 1: not; 2: refused, nothing was run."""
    asked = _parser().parse_args(argv)
    chosen = [name for name in asked.parts.split(",") if name]
    if unknown := [name for name in chosen if name not in PARTS]:
        return _refused(f"--parts {', '.join(unknown)}: there are {', '.join(PARTS)}")
    if not asked.model.startswith("random:"):
        return _refused(
            f"--model {asked.model}: the rows are made for the tokenizer of random: models"
        )
    cards = (
        tuple(filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")))[:2]
        if asked.device == "cuda"
        else ()
    )
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # two_gpus.sh says why
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="glassloop-two-") as temporary:
        work = asked.work.absolute() if asked.work else Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if (work / "runs").exists():
            return _refused(f"--work {work}: it holds runs already; take an empty folder")
        place = Place(asked.device, asked.model, work, cards)
        what = Asked(
            updates=asked.updates,
            first=asked.first,
            verify_only=asked.verify_only,
            rows_per_update=asked.rows_per_update,
            bench_updates=asked.bench_updates,
            workloads=tuple(asked.workloads.split(",")),
            pythons=tuple(tuple(pair.split("=", 1)) for pair in asked.python),  # type: ignore[arg-type]
        )
        try:
            machine, why = machine_of(place)
            if why:
                return _refused(why)
            lengths = write_rows(work / "rows.jsonl", "scam-v1", ROWS)
            out = (
                asked.out or ROOT / "benchmarks" / "results" / f"two-gpus-{card_name(machine)}.json"
            ).absolute()
            about = {
                "what": "two_gpus",
                "schema": SCHEMA,
                "date": datetime.now(UTC).date().isoformat(),
                "asked": vars(what)
                | {
                    "device": asked.device,
                    "model": asked.model,
                    "parts": chosen,
                    "minutes": asked.minutes,
                },
                "rows": {"workload": "scam-v1", "rows": ROWS, "tokens": sum(lengths)},
                "machine": machine,
            }
            found = run_stages(
                place,
                what,
                chosen,
                began + asked.minutes * 60,
                lambda found: write(out, about, found, began),
            )
        finally:
            for one in list(RUNNING):
                end(one, 5.0)
    print(
        "\n".join(
            ["", *summary(machine, found), f"{time.monotonic() - began:.0f} s; send back {out}"]
        )
    )
    return 0 if all(verdict["verdict"] in ("held", "left out") for verdict in found.values()) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="two_gpus.sh", allow_abbrev=False, description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--parts",
        default=",".join(PARTS),
        help=f"default: all of {', '.join(PARTS)}; one_rank, ddp and fused are compared with peft",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=14.5,
        help="for everything; parts that it does not reach fail (default: 14.5)",
    )
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="LIBRARY=PATH",
        help="interpreter of trl or unsloth",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: benchmarks/results/two-gpus-CARD.json"
    )
    parser.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="keep runs and logs there (default: a temporary folder)",
    )
    parser.add_argument(
        "--device",
        default="cuda",
        choices=["cuda", "cpu"],
        help="cpu: two gloo ranks, to test this script",
    )
    parser.add_argument("--model", default="random:llama-8b", help="random:llama-8b or random:tiny")
    parser.add_argument("--updates", type=int, default=60, help="of the recipe's run (default: 60)")
    parser.add_argument(
        "--first",
        type=int,
        default=8,
        help="updates that other ways are compared over (default: 8)",
    )
    parser.add_argument(
        "--verify-only", default="", metavar="TEXT", help="glassloop verify --only TEXT"
    )
    parser.add_argument(
        "--workloads",
        default=",".join(Asked.workloads),
        help="of bench and peers (default: full-v1,scam-v1)",
    )
    parser.add_argument(
        "--rows-per-update",
        type=int,
        default=16,
        help="of bench and peers, over all ranks (default: 16)",
    )
    parser.add_argument(
        "--bench-updates", type=int, default=3, help="measured updates of an arm (default: 3)"
    )
    return parser


def _refused(why: str) -> int:
    print(f"refused: {why}", file=sys.stderr)
    return 2


def machine_of(place: Place) -> tuple[dict[str, Any], str]:
    """What two_gpus_machine.py says, and why nothing can be run here ("" where it can)."""
    words = [place.python, str(Path(__file__).with_name("two_gpus_machine.py")), place.device]
    try:
        done = subprocess.run(
            words,
            env=place.environment(2),
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
    if place.device == "cuda" and machine["cards_seen"] < 2:
        return (
            machine,
            f"torch sees {machine['cards_seen']} CUDA devices, and this needs two; --device cpu "
            "--model random:tiny tests the script",
        )
    return machine, ""


def card_name(machine: dict[str, Any]) -> str:
    """A card's name as part of a file's."""
    name = machine["gpus"][0]["name"].lower().removeprefix("nvidia ") if machine["gpus"] else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def run_stages(
    place: Place, asked: Asked, chosen: list[str], last: float, written: Any
) -> dict[str, dict[str, Any]]:
    """Run the chosen parts. Returns title -> verdict, in order, as plain values.

    Args:
        last: time.monotonic() at which all must be over.
        written: called with what there is after each stage.
    """
    found: dict[str, dict[str, Any]] = {}
    for limit_s, names in STAGES:
        began = time.monotonic()
        until = min(began + limit_s, last)
        results: dict[str, dict[str, Verdict]] = {}
        mine = [name for name in names if name in chosen]
        others = [
            threading.Thread(target=_run, args=(name, place, asked, until, results), daemon=True)
            for name in mine[1:]
        ]
        for thread in others:
            thread.start()
        if mine:
            _run(mine[0], place, asked, until, results)  # here: Ctrl-C and SIGTERM reach it
        for thread in others:
            while thread.is_alive():
                thread.join(0.2)
        for name in mine:
            for title, verdict in results[name].items():
                found[title] = vars(verdict) | {
                    "part": name,
                    "stage_s": round(time.monotonic() - began, 1),
                }
                print(line_of(title, found[title]), flush=True)
        written(found)
    return found


def _run(
    name: str, place: Place, asked: Asked, until: float, results: dict[str, dict[str, Verdict]]
) -> None:
    """One part; whatever it raises is its own failure."""
    if time.monotonic() >= until - 1:
        results[name] = {name: parts.failed("no time was left (--minutes)")}
        return
    try:
        results[name] = PARTS[name](place, asked, until)
    except Exception as error:  # any fault of a part: the others go on, and the JSON says it
        results[name] = {name: parts.failed(f"{type(error).__name__}: {error}"[:600])}


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


def summary(machine: dict[str, Any], found: dict[str, dict[str, Any]]) -> list[str]:
    """For people: the machine in a line, then each part's verdict."""
    cards = ", ".join(gpu["name"] for gpu in machine["gpus"][:2]) or machine["cpu"] or "CPU"
    link = (
        f"P2P {'yes' if machine['p2p'] else 'no'}, driver {machine['driver']}, NCCL "
        f"{machine['nccl']}"
        if machine["gpus"]
        else "gloo"
    )
    lines = [
        f"{cards}; {link}; torch {machine['packages']['torch']}; 4 MiB all-reduce: "
        f"{machine['all_reduce_4_mib']['outcome']}"
    ]
    lines += [line_of(title, verdict) for title, verdict in found.items()]
    run = found.get("the recipe, peft", {}).get("numbers", {})
    if run.get("updates_timed"):
        lines.append(
            f"communication, rank 0, peft: {run['reduce_share']:.2%} of an update sums gradients "
            f"({run['reduce_s_median'] * 1e3:.1f} ms), "
            f"{run['waiting_share']:.2%} waits for the other rank and exchanges reports"
        )
    return lines


def line_of(title: str, verdict: dict[str, Any]) -> str:
    return f"{verdict['verdict']:<8}  {title:<28}  {verdict['why']}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
