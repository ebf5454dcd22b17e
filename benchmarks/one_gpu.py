"""Everything that one card is to show of bases and rows that outgrow it, into one JSON.

See one_gpu.sh, which starts it. Each part has its own time limit, and one that fails does not stop
the others. Parts that the JSON has already are not run again. Verdicts: held, missed (measured, and
below its mark), failed (not measured; it is run again), left out. The JSON is written anew after
every part.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import one_gpu_parts
import one_gpu_rows
import one_gpu_speed
import suite
from one_gpu_commands import Here, Part, run_part
from suite import Verdict, card_name, line_of, machine_of, refused
from two_gpus_runs import ROOT, RUNNING, Place, end, write_rows

SCHEMA = 1
ROWS = 600
PARTS: dict[str, Part] = {**one_gpu_parts.PARTS, **one_gpu_speed.PARTS, **one_gpu_rows.PARTS}
# Run side by side, since none is a measure of speed. All others run alone.
BESIDE = ("limited", "killed", *one_gpu_rows.TOGETHER["gpu_tests"])
STAGES: tuple[tuple[float, tuple[str, ...]], ...] = (
    (max(PARTS[name].limit_s for name in BESIDE), BESIDE),
    *((part.limit_s, (name,)) for name, part in PARTS.items() if name not in BESIDE),
)
MODELS = ("random:llama-70b", "random:llama-8b")


def main(argv: list[str]) -> int:
    """Exit code 0: all parts held (or were left out); 1: not; 2: refused, nothing was run."""
    asked = _parser().parse_args(argv)
    given = [name for name in asked.parts.split(",") if name]
    chosen = [one for name in given for one in one_gpu_rows.TOGETHER.get(name, [name])]
    if why := _fault(asked, chosen):
        return refused(why)
    cards = tuple(filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")))[:1]
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="glassloop-one-") as temporary:
        work = asked.work.absolute() if asked.work else Path(temporary)
        place = Place(asked.device, asked.model, work, cards if asked.device == "cuda" else ())
        here = here_of(asked, place)
        if asked.dry_run:
            print("\n".join(dry(here, chosen)))
            return 0
        work.mkdir(parents=True, exist_ok=True)
        try:
            machine, why = machine_of(place, 1)
            if why:
                return refused(why)
            name = f"one-gpu-{card_name(machine)}.json"
            out = (asked.out or ROOT / "benchmarks" / "results" / name).absolute()
            about = about_of(asked, machine)
            before, why = past_of(out, about)
            if why:
                return refused(why)
            prepare(here, asked)
            found = run_chosen(here, asked, chosen, out, about, before, began)
        finally:
            for one in list(RUNNING):
                end(one, 5.0)
    print("\n".join(["", *summary(machine, found), f"{out}, {time.monotonic() - began:.0f} s"]))
    mine = [verdict["verdict"] for name, verdict in found.items() if name in chosen]
    return 0 if all(one in ("held", "left out") for one in mine) else 1


def _parser() -> argparse.ArgumentParser:
    marks = "".join(f"\n  {name:<22} {part.mark}" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="one_gpu.sh",
        allow_abbrev=False,
        description=(__doc__ or "").split("\n")[0],
        epilog=f"parts and their marks:{marks}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    also = " and ".join(one_gpu_rows.TOGETHER)
    add("--parts", default=",".join(PARTS), help=f"names, by comma, {also} too (default: all)")
    add("--minutes", type=float, default=90.0, help="for everything; parts behind it fail")
    add("--again", action="store_true", help="run parts that the JSON has already")
    add("--dry-run", action="store_true", help="print each part's commands and run nothing")
    add("--rows", type=Path, metavar="CSV", help="calls in the columns of format scam")
    add("--tokenizer", type=Path, metavar="DIR", help="beside the drawn weights, for --rows")
    add("--updates", type=int, default=60, help="of the limited run (default: 60)")
    add(
        "--layers",
        type=int,
        default=12,
        help="of 70B shapes in killed, half_bus and streamed (default: 12)",
    )
    add("--out", type=Path, metavar="FILE", help="default: benchmarks/results/one-gpu-CARD.json")
    add("--work", type=Path, metavar="DIR", help="keep runs and logs (default: a temporary folder)")
    add("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: to test this script")
    add("--model", default="", help="for every part, such as random:tiny (default: its own)")
    return parser


def _fault(asked: argparse.Namespace, chosen: list[str]) -> str:
    """Why nothing is run; "" if there is no reason."""
    if unknown := [name for name in chosen if name not in PARTS]:
        return f"--parts {', '.join(unknown)}: there are {', '.join(PARTS)}"
    if asked.model and not asked.model.startswith("random:"):
        return f"--model {asked.model}: it must be drawn, such as random:tiny"
    if asked.device == "cpu" and not asked.model:
        return "--device cpu needs --model random:tiny: a CPU does not train 70B shapes"
    if asked.rows and not asked.rows.is_file():
        return f"--rows {asked.rows}: there is no such file"
    if asked.tokenizer and not (asked.tokenizer / "tokenizer.json").is_file():
        return f"--tokenizer {asked.tokenizer}: it holds no tokenizer.json"
    for name in ("updates", "layers", "minutes"):
        if getattr(asked, name) < 1:
            return f"--{name} {getattr(asked, name)}: it must be 1 or more"
    return ""


def here_of(asked: argparse.Namespace, place: Place) -> Here:
    rows = asked.rows.absolute() if asked.rows else place.work / "rows.jsonl"
    source = [f"data.source={rows}"]
    if not asked.rows:
        source += ["data.format=prompt_completion"]
    if not asked.tokenizer:
        source += ["data.template=chat"]
    own_cache = {"GLASSLOOP_CACHE": str(place.work / "cache")} if asked.tokenizer else {}
    return Here(
        place,
        asked.model,
        tuple(source),
        real_rows=asked.rows is not None,
        updates=asked.updates,
        layers=asked.layers,
        variables=own_cache,
    )


def of_part(here: Here, name: str) -> Here:
    """The place of a part's next attempt: work/NAME, or work/NAME-2."""
    folders = [here.work / name, *(here.work / f"{name}-{turn}" for turn in range(2, 1000))]
    work = next(folder for folder in folders if not folder.exists())
    return replace(here, place=replace(here.place, work=work))


def dry(here: Here, chosen: list[str]) -> list[str]:
    """Each part's commands, as a shell takes them."""
    lines: list[str] = []
    for name in (name for _, names in STAGES for name in names if name in chosen):
        part = PARTS[name]
        lines.append(f"# {name}: {part.mark}; at most {part.limit_s:g} s")
        there = of_part(here, name)
        lines += [command.line(there) for command in part.commands(there)]
    return lines


def about_of(asked: argparse.Namespace, machine: dict[str, Any]) -> dict[str, Any]:
    def digest(path: Path | None) -> str | None:
        return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()

    return {
        "what": "one_gpu",
        "schema": SCHEMA,
        "asked": {
            "device": asked.device,
            "model": asked.model,
            "updates": asked.updates,
            "layers": asked.layers,
            "rows_sha256": digest(asked.rows),
            "tokenizer_sha256": digest(asked.tokenizer and asked.tokenizer / "tokenizer.json"),
        },
        "machine": machine,
    }


def past_of(out: Path, about: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Parts that the JSON has already, and why none may be added to it."""
    if not out.exists():
        return {}, ""
    try:
        past = json.loads(out.read_text(encoding="utf-8"))
        same = [past["what"], past["schema"], past["asked"], card_name(past["machine"])]
        parts: dict[str, Any] = past["parts"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        return {}, f"--out {out}: it is no result of this script ({error!r}); name another file"
    mine = [about["what"], about["schema"], about["asked"], card_name(about["machine"])]
    if same != mine:
        return {}, f"--out {out}: it was measured with {same}, this is {mine}; name another file"
    return parts, ""


def prepare(here: Here, asked: argparse.Namespace) -> None:
    """Make the rows; put the tokenizer into a cache of this work folder."""
    if not asked.rows:
        write_rows(here.work / "rows.jsonl", "scam-v1", ROWS)
    if not asked.tokenizer:
        return
    models = [asked.model] if asked.model else [*MODELS, f"{MODELS[0]}:{asked.layers}"]
    script = str(Path(__file__).with_name("one_gpu_tokenizer.py"))
    words = [here.place.python, script, str(asked.tokenizer.absolute()), *models]
    given = {**here.place.environment(1), **here.variables}
    subprocess.run(words, env=given, check=True)


def run_chosen(
    here: Here,
    asked: argparse.Namespace,
    chosen: list[str],
    out: Path,
    about: dict[str, Any],
    before: dict[str, Any],
    began: float,
) -> dict[str, Any]:
    """Run what is chosen and not in `before`; all verdicts, in the order of PARTS."""
    known = {name: one for name, one in before.items() if one["verdict"] != "failed"}
    due = [name for name in chosen if asked.again or name not in known]
    for name in (name for name in chosen if name not in due):
        print(f"{name} is in {out} already (--again runs it again)", flush=True)
    told = {
        "git": about["machine"]["git"],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": about["machine"]["packages"],
    }
    lines: dict[str, list[str]] = {}

    def run(name: str, until: float) -> dict[str, Verdict]:
        there = of_part(here, name)
        there.work.mkdir(parents=True)
        lines[name] = [command.line(there) for command in PARTS[name].commands(there)]
        return {name: run_part(there, PARTS[name], until)}

    def whole(found: dict[str, Any]) -> dict[str, Any]:
        new = {name: one | told | {"lines": lines.get(name, [])} for name, one in found.items()}
        both = before | new
        return {name: both[name] for name in PARTS if name in both}

    def written(found: dict[str, Any]) -> None:
        suite.write(out, about, whole(found), began)

    return whole(suite.run_stages(STAGES, run, due, began + asked.minutes * 60, written))


def summary(machine: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """For people: the machine in a line, then each part's verdict."""
    card = machine["gpus"][0]["name"] if machine["gpus"] else machine["cpu"] or "CPU"
    lines = [f"{card}; torch {machine['packages']['torch']}; {machine['host_spare_gib']} GiB spare"]
    return lines + [line_of(name, verdict) for name, verdict in found.items()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
