"""Long rows on small cards: the longest that trains, tokens/s, GiB. Unsloth in the same run.

    python benchmarks/long_rows.py --out FILE
    python benchmarks/long_rows.py --only rows --cards 24 --lengths longest --out FILE
    python benchmarks/long_rows.py --only two --cards 24 --lengths 65536 --ranks 2 --out FILE

    rows      one row of each length on each card; `longest` is the length that a plan names
    unsloth   the same rows through Unsloth's own loader, in a process of its own
    short     passes of full and of short rows: tiers chosen by their longest row, and without
    two       rows that --ranks cards share, and how far a shared row's gradient is off
    compare   one row by every tier, and how far its gradient is off

One large card stands for small ones: torch may take as much as they have. Each line is written as
it comes. A case that gives no line for --limit seconds is ended, which is a line too, and the
others follow in a new process. No torch here.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
KINDS = ("rows", "unsloth", "short", "two", "compare")
LOAD_S = 240.0  # to load the base: a first time draws and quantises it
GRACE_S = 10.0  # after SIGTERM


def cases_of(asked: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Cases by what computes them: ours, shared, unsloth."""
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "unsloth": [], "shared": []}
    lengths = [one if one == "longest" else int(one) for one in asked.lengths.split(",")]
    only = asked.only.split(",")
    if "two" in only:
        found["shared"].append({"kind": "shared", "tokens": asked.shared})
    if "compare" in only:
        found["ours"].append({"kind": "compare", "tokens": asked.compare})
    for card in map(float, asked.cards.split(",")):
        row = {"card_gb": card, "profile": asked.profile}
        for length in lengths:
            one = row | {"asked": length}
            if "rows" in only:
                found["ours"].append({"kind": "case"} | one)
            if "unsloth" in only and length != "longest":
                found["unsloth"].append({"kind": "case"} | one)
            if "two" in only:
                found["shared"].append({"kind": "case"} | one)
    if "short" in only:
        for workload in ("full", "short"):
            one = {"workload": workload, "tokens": asked.short_tokens}
            found["ours"].append({"kind": "short", "card_gb": asked.short_card} | one)
    return found


def commands(asked: argparse.Namespace) -> dict[str, list[str]]:
    """The process of each kind of case; the file of what is asked comes last."""
    ours = str(HERE / "long_rows_cases.py")
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={asked.ranks}", ours]
    return {
        "ours": [sys.executable, ours],
        "shared": [sys.executable, *ranks],
        "unsloth": [asked.unsloth_python, str(HERE / "long_rows_unsloth.py")],
    }


def run_cases(
    command: Sequence[str],
    cases: list[dict[str, Any]],
    settings: dict[str, Any],
    *,
    engine: str,
    limit_s: float,
    load_s: float,
    out: Path,
) -> None:
    """Have a process do the cases; go on in a new one without a case that hangs or kills it.

    Its lines get `engine` and go to `out`.
    """
    left = list(cases)
    with tempfile.TemporaryDirectory(prefix="long-rows-") as name:
        work = Path(name)
        while left:
            lines, words = work / "lines.jsonl", work / "asked.json"
            lines.write_text("")
            words.write_text(json.dumps(settings | {"cases": left, "out": str(lines)}))
            failed = _watched([*command, str(words)], lines, work / "log", limit_s, load_s)
            said = [json.loads(line) for line in lines.read_text().splitlines()]
            for line in said:
                if line["kind"] != "done":
                    _say(out, {"engine": engine} | line)
            left = left[sum(line["kind"] == "done" for line in said) :]
            if not left:
                return
            tail = (work / "log").read_text(errors="replace").strip().splitlines()[-3:]
            why = failed or "its process ended: " + " | ".join(tail)[-400:]
            if not said:  # not even the base: no other case will do better
                for one in left:
                    _say(out, {"engine": engine} | one | {"trained": False, "error": why})
                return
            _say(out, {"engine": engine} | left.pop(0) | {"trained": False, "error": why})


def _watched(
    command: list[str], lines: Path, log: Path, limit_s: float, load_s: float
) -> str | None:
    """Run a process until it ends; or why it was ended: no line within its limit."""
    with log.open("w") as told:
        process = subprocess.Popen(
            command, stdout=told, stderr=told, start_new_session=True, cwd=HERE.parent
        )
    seen, since = 0, time.monotonic()
    try:
        while process.poll() is None:
            time.sleep(0.2)
            size = lines.stat().st_size
            if size != seen:
                seen, since = size, time.monotonic()
            limit = limit_s if seen else load_s
            if time.monotonic() - since > limit:
                what = "case" if seen else "base"
                return f"took over {limit:g} s: the {what} was given up"
    finally:
        _end(process)
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that runs yet, with the ranks that it started."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _say(out: Path, line: dict[str, Any]) -> None:
    text = json.dumps(line)
    print(text, flush=True)
    with out.open("a", encoding="utf-8") as file:
        file.write(text + "\n")


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="rows,unsloth,short", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--model", default="random:llama-8b")
    parser.add_argument("--cards", default="24,12,8", help="GB; a card of 24 has 23.5 GiB")
    parser.add_argument("--lengths", default="16384,32768,65536,longest", help="tokens of a row")
    parser.add_argument("--profile", default="fill", choices=("fill", "min"))
    parser.add_argument("--base", default="auto", help="memory.base")
    parser.add_argument("--host-gib", type=float, help="memory.host_gib; without: auto")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20, help="of updates a case, about")
    parser.add_argument("--limit", type=float, default=300, help="seconds of a case, at most")
    parser.add_argument("--ranks", type=int, default=2, help="cards that share a row, for two")
    parser.add_argument("--shared", type=int, default=8192, help="tokens of the row for two")
    parser.add_argument("--compare", type=int, default=16384, help="tokens of the compared row")
    parser.add_argument("--short-card", type=float, default=80, help="GB, for short")
    parser.add_argument("--short-tokens", type=int, default=0, help="of each row; 0: as usual")
    parser.add_argument("--unsloth-python", default=sys.executable)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args(words)
    if unknown := [one for one in asked.only.split(",") if one not in KINDS]:
        parser.error(f"--only {','.join(unknown)}: choose of {', '.join(KINDS)}")
    return asked


def main(words: Sequence[str]) -> int:
    asked = parse(words)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text("")
    names = ("model", "base", "host_gib", "r", "seconds", "device")
    settings = {name: getattr(asked, name) for name in names}
    by = commands(asked)
    for kind, cases in cases_of(asked).items():
        engine = "unsloth" if kind == "unsloth" else "fused"
        run_cases(
            by[kind], cases, settings, engine=engine, limit_s=asked.limit, load_s=LOAD_S,
            out=asked.out,
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
