"""Other trainers on the same rows, adapters and optimizer, beside glassloop.

Each in a process of its own, one line in the results' own form.

    python benchmarks/peers.py --peers trl,unsloth-trainer --workloads scam-v1,full-v1 --python
    unsloth=/path/to/env/bin/python --out FILE python benchmarks/peers.py --turns 5 --updates 1
    --warmup 1 --workloads full-v1 --peers unsloth-kept --ours fused,memory.profile=20.9 --out FILE

The second form measures side by side: all arms of a workload are loaded, and in every turn one
after the other carries out its updates while the rest waits with its activations given back. A
ratio is taken turn by turn, so a card that slows down slows down both.

Loss and norm of update 1 are held to the reference engine's on the same rows; where FILE has no
such line, one is measured first. A peer's interpreter needs that peer; glassloop itself is found
through PYTHONPATH, and only parts of it without dependencies are imported there. `--ranks 2`: the
peer's own way with two cards, `accelerate launch` and DDP.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from peer_arm import PEERS

from glassloop.bench.matrix import keep, run_groups, schedule, told
from glassloop.bench.processes import Place, Start, run_command
from glassloop.bench.results import is_reference, read
from glassloop.bench.spec import Spec
from glassloop.bench.table import beside, table
from glassloop.config import ENGINES
from glassloop.verify.processes import launch_file


def main(argv: list[str]) -> int:
    asked = _parser().parse_args(argv)
    pythons = dict(pair.split("=", 1) for pair in asked.python)
    counts = [int(text) for text in asked.ranks.split(",")]
    for count in counts:
        if asked.rows_per_update % count:
            raise SystemExit(
                f"--ranks {count}: it must divide --rows-per-update {asked.rows_per_update}"
            )
    place = Place(asked.device, max(counts) if asked.device == "cuda" else 0)
    common = dict(
        rows_per_update=asked.rows_per_update,
        model=asked.model,
        precision=asked.precision,
        updates=asked.updates,
        warmup=asked.warmup,
        turns=asked.turns,
        device=asked.device,
    )
    out = asked.out.absolute()
    known = read(out) if out.exists() else []
    mine: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="glassloop-peers-") as temporary:
        folder = Path(temporary)
        base = base_folder(asked.model, asked.precision, asked.device, folder / "base")

        def start(spec: Spec, number: int) -> Start:
            work = folder / f"{spec.workload}-{number}"
            if spec.engine not in PEERS:
                return Start.of_ours(spec, work, pythons.get(spec.engine, sys.executable))
            python = pythons.get(PEERS[spec.engine].library, sys.executable)
            return Start(spec, peer_command(spec, python, work, base), work)

        for rows in asked.workloads.split(","):
            specs = [ours(text, rows, count, common) for text in asked.ours for count in counts]
            specs += [peer(name, rows, count, common) for name in asked.peers for count in counts]
            order = [
                spec
                for spec in schedule(specs, asked.repeats)
                if not (spec.check_only and any(_serves(line, spec) for line in [*known, *mine]))
            ]
            starts = [start(spec, number) for number, spec in enumerate(order)]
            if asked.turns:
                mine += run_groups([starts], place, out, _say, known, timeout_s=asked.timeout)
                continue
            for one in starts:
                line = run_command(one, place, asked.timeout)
                keep(line, mine, out, known)
                _say(f"{line['name']}: {told(line)}")
    print("\n".join([*table(mine), "", *beside(mine, list(PEERS))]))
    return 0 if all(line["check"]["within"] for line in mine) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="peers.py", allow_abbrev=False, description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--peers", type=_peers, default=list(PEERS), help=f"default: all of {', '.join(PEERS)}"
    )
    parser.add_argument(
        "--ours",
        type=_ours,
        action="append",
        default=[],
        metavar="ENGINE,..",
        help="add an arm of glassloop: its engine, then what differs from literal, batch 2, "
        "recomputed: packed, kept, batch=N, execution.FIELD=VALUE, memory.FIELD=VALUE "
        "(may be given several times)",
    )
    parser.add_argument("--workloads", default="scam-v1,full-v1")
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="LIBRARY=PATH",
        help="interpreter of trl, unsloth or axolotl",
    )
    parser.add_argument("--model", default="random:llama-8b", help="model.id of the base")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument(
        "--ranks",
        default="1",
        metavar="N,..",
        help="cards that share an update's rows under DDP (default: 1)",
    )
    parser.add_argument(
        "--rows-per-update", type=int, default=8, help="over all ranks (default: 8)"
    )
    parser.add_argument(
        "--updates", type=int, default=5, help="measured, in every turn (default: 5)"
    )
    parser.add_argument(
        "--warmup",
        type=int,
        default=2,
        help="not measured, at the beginning of every turn (default: 2)",
    )
    parser.add_argument(
        "--turns",
        type=int,
        default=0,
        metavar="N",
        help="side by side, N turns each (default: one after the other)",
    )
    parser.add_argument(
        "--repeats", type=int, default=1, help="without --turns: how often each arm is run"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="longest time of an arm, or of its turn",
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, required=True, help="results are added to it")
    return parser


def _peers(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in PEERS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: there are {', '.join(PEERS)}")
    return names


def _ours(text: str) -> list[str]:
    engine, *rest = text.split(",")
    if engine not in ENGINES:
        raise argparse.ArgumentTypeError(f"{engine}: there are {', '.join(ENGINES)}")
    for word in rest:
        if word not in ("packed", "kept") and not re.fullmatch(
            r"batch=\d+|(execution|memory)\.[a-z_]+=.+", word
        ):
            raise argparse.ArgumentTypeError(
                f"{word}: say packed, kept, batch=N, execution.FIELD=VALUE or memory.FIELD=VALUE"
            )
    return [engine, *rest]


def ours(words: list[str], rows: str, ranks: int, common: dict[str, Any]) -> Spec:
    """An arm of glassloop, from the words of --ours."""
    engine, *rest = words
    batch = next(
        (int(word.removeprefix("batch=")) for word in rest if word.startswith("batch=")), 2
    )
    return Spec(
        engine=engine,
        workload=rows,
        layout="packed" if "packed" in rest else "literal",
        ranks=ranks,
        batch=min(batch, common["rows_per_update"] // ranks),
        checkpointing="kept" not in rest,
        varied=tuple(word for word in rest if "." in word),
        **common,
    )


def peer(name: str, rows: str, ranks: int, common: dict[str, Any]) -> Spec:
    """A peer's arm."""
    how = PEERS[name]
    return Spec(
        engine=name,
        workload=rows,
        layout="packed" if how.padding_free else "literal",
        ranks=ranks,
        batch=min(how.batch, common["rows_per_update"] // ranks),
        checkpointing=how.checkpointing,
        **common,
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _serves(line: dict[str, Any], spec: Spec) -> bool:
    """Whether a known line is the reference that `spec` would measure."""
    same = ("workload", "rows_per_update", "precision", "model", "r")
    return (
        "failed" not in line
        and is_reference(line["cell"])
        and all(line["cell"][name] == spec.cell[name] for name in same)
    )


def peer_command(spec: Spec, python: str, work: Path, base: Path) -> list[str]:
    """How a peer's process is started.

    With several ranks by Accelerate's launcher, as its own documentation has it.
    """
    words = [
        str(Path(__file__).resolve().with_name("peer_arm.py")),
        str(work / "spec.json"),
        str(base),
    ]
    if spec.ranks == 1:
        return [python, *words]
    work.mkdir(parents=True, exist_ok=True)
    (work / "launch.yaml").write_text(launch_file(spec.device), encoding="utf-8")
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(work / "launch.yaml")]
    return [python, *launcher, "--num_processes", str(spec.ranks), *words]


def base_folder(model: str, precision: str, device: str, folder: Path) -> Path:
    """A folder with the base in NF4 and its tokenizer, as links into glassloop's cache, where it is
    made if need be.
    """
    code = (
        "import contextlib, sys, torch\n"
        "from glassloop.base.quantised import load_base\n"
        "from glassloop.base.source import resolve_source\n"
        "from glassloop.config import ModelConfig\n"
        "model = ModelConfig(id=sys.argv[1])\n"
        "device = torch.device(sys.argv[3], 0) if sys.argv[3] == 'cuda' else torch.device('cpu')\n"
        "_, report = load_base(model, precision=sys.argv[2], device=device, "
        "first=contextlib.nullcontext)\n"
        "print('FOLDERS', report.folder, resolve_source(model).folder, sep='\\n')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, model, precision, device],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"--model {model} cannot be made: {done.stderr.strip()[-600:]}")
    weights, source = map(Path, done.stdout.rpartition("FOLDERS\n")[2].split("\n")[:2])
    folder.mkdir()
    # The weights' config.json comes last and stays.
    for file in [*source.iterdir(), *weights.iterdir()]:
        link = folder / file.name
        link.unlink(missing_ok=True)
        link.symlink_to(file)
    return folder


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
