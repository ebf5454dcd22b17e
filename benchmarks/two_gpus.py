"""Everything that two cards are to show, one part after the other, into one JSON.

See two_gpus.sh, which starts it.

Each part has its own time limit, and one that fails does not stop the others. Verdicts: held,
missed (measured, and below its mark), failed (not measured), left out (a peer that is not
installed). The JSON is written anew after every part.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import suite
import two_gpus_hosts
import two_gpus_killed
import two_gpus_more
import two_gpus_parts as parts
import two_gpus_speed
from suite import Verdict, card_name, earlier, line_of, machine_of, refused, stamped, write
from two_gpus_parts import Asked
from two_gpus_runs import ROOT, RUNNING, Place, end, write_rows

SCHEMA = 1
ROWS = 600
# Stages, in order: parts of one stage run side by side, which only those may that are judged by
# results and not by their speed. Seconds: the limit.
STAGES: tuple[tuple[float, tuple[str, ...]], ...] = (
    (300.0, ("peft",)),
    (240.0, ("one_rank", "verify", "killed")),
    (90.0, ("ddp",)),
    (150.0, ("fused",)),
    (120.0, ("packed",)),
    (180.0, ("fused_exact",)),
    (120.0, ("bisect", "two_hosts")),
    (120.0, ("stalled", "two_runs")),
    (330.0, ("bench",)),
    (150.0, ("trl",)),
    (300.0, ("unsloth",)),
    (150.0, ("streamed",)),
    (240.0, ("fsdp",)),
)
FILES = (parts, two_gpus_killed, two_gpus_more, two_gpus_hosts, two_gpus_speed)
PARTS: dict[str, parts.Part] = {
    name: next(getattr(file, name) for file in FILES if hasattr(file, name))
    for _, names in STAGES
    for name in names
}
# Parts of one call each; a part that is compared with another's run stands beside it.
GROUPS = {
    "A": ("peft", "one_rank", "ddp", "fused", "packed"),
    "B": ("verify", "killed", "fused_exact", "bisect", "two_hosts", "stalled", "two_runs"),
    "C": ("bench", "trl"),
    "D": ("unsloth", "streamed", "fsdp"),
}
GROUP_MINUTES = 8.5


def main(argv: list[str]) -> int:
    """Exit code 0: all parts held (or were left out); 1: not; 2: refused, nothing was run."""
    asked = _parser().parse_args(argv)
    words = [name for name in asked.parts.split(",") if name]
    chosen = [name for word in words for name in GROUPS.get(word, (word,))]
    if unknown := [name for name in chosen if name not in PARTS]:
        names = f"{', '.join(PARTS)}, and the groups {', '.join(GROUPS)}"
        return refused(f"--parts {', '.join(unknown)}: there are {names}")
    touched = sum(any(name in chosen for name in names) for names in GROUPS.values())
    minutes = asked.minutes or GROUP_MINUTES * touched
    if not asked.model.startswith("random:"):
        return refused(
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
            return refused(f"--work {work}: it holds runs already; take an empty folder")
        place = Place(asked.device, asked.model, work, cards)
        what = Asked(
            updates=asked.updates,
            first=asked.first,
            verify_only=asked.verify_only,
            rows_per_update=asked.rows_per_update,
            bench_updates=asked.bench_updates,
            workloads=tuple(asked.workloads.split(",")),
            layers=asked.layers,
            slower=asked.slower,
            pythons=tuple(tuple(pair.split("=", 1)) for pair in asked.python),  # type: ignore[arg-type]
        )
        try:
            machine, why = machine_of(place, 2)
            if why:
                return refused(why)
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
                    "minutes": minutes,
                },
                "rows": {"workload": "scam-v1", "rows": ROWS, "tokens": sum(lengths)},
                "machine": machine,
            }
            try:
                kept = earlier(out, machine, chosen) if asked.add else {}
            except ValueError as error:
                return refused(str(error))
            commit = (machine.get("git") or {}).get("commit")
            found = run_stages(
                place,
                what,
                chosen,
                began + minutes * 60,
                lambda found: write(out, about, kept | stamped(found, commit), began),
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
        help=f"parts or groups of them, default: all. Parts: {', '.join(PARTS)}. Groups: "
        + "; ".join(f"{group} = {', '.join(names)}" for group, names in GROUPS.items()),
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="for everything; parts that it does not reach fail (default: 8.5 a group)",
    )
    parser.add_argument(
        "--slower",
        type=float,
        default=1.0,
        metavar="TIMES",
        help="each part's limit, so many times",
    )
    parser.add_argument(
        "--add", action="store_true", help="keep what the file of results holds of other parts"
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
    parser.add_argument(
        "--layers", type=int, default=16, help="of 70B shapes in streamed and fsdp (default: 16)"
    )
    return parser


def run_stages(
    place: Place, asked: Asked, chosen: list[str], last: float, written: Any
) -> dict[str, dict[str, Any]]:
    """Run the chosen parts (see suite.run_stages)."""

    def run(name: str, until: float) -> dict[str, Verdict]:
        return PARTS[name](place, asked, until)

    stages = [(limit_s * asked.slower, names) for limit_s, names in STAGES]
    return suite.run_stages(stages, run, chosen, last, written)


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
