"""Other trainers on the same rows, adapters and optimizer, beside glassloop: each in a process of its own, one line in the results' own form.

    python benchmarks/peers.py --peers trl,unsloth --workloads scam-v1,full-v1 --python unsloth=/path/to/env/bin/python --out FILE

Loss and norm of update 1 are held to the reference engine's on the same rows; where FILE has no such line, one is measured first. A peer's
interpreter needs that peer; glassloop itself is found through PYTHONPATH, and only parts of it without dependencies are imported there.
`--ranks 2`: the peer's own way with two cards, `accelerate launch` and DDP.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from peer_arm import PEERS

from glassloop.bench.matrix import Place, run_arm, run_command, schedule
from glassloop.bench.results import append, checked, is_reference, read
from glassloop.bench.spec import Spec
from glassloop.bench.table import table
from glassloop.verify.processes import launch_file


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="peers.py", allow_abbrev=False, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--peers", default=",".join(PEERS), help=f"default: all of {', '.join(PEERS)}")
    parser.add_argument("--workloads", default="scam-v1,full-v1")
    parser.add_argument("--python", action="append", default=[], metavar="LIBRARY=PATH", help="interpreter of trl or unsloth")
    parser.add_argument("--model", default="random:llama-8b", help="model.id of the base")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--ranks", default="1", metavar="N,..", help="cards that share an update's rows under DDP (default: 1)")
    parser.add_argument("--rows-per-update", type=int, default=8, help="over all ranks (default: 8)")
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="longest time of an arm")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, required=True, help="results are added to it")
    asked = parser.parse_args(argv)
    peers = [name for name in asked.peers.split(",") if name]
    if unknown := [name for name in peers if name not in PEERS]:
        raise SystemExit(f"--peers {', '.join(unknown)}: there are {', '.join(PEERS)}")
    pythons = dict(pair.split("=", 1) for pair in asked.python)
    counts = [int(text) for text in asked.ranks.split(",")]
    for count in counts:
        if asked.rows_per_update % count:
            raise SystemExit(f"--ranks {count}: it must divide --rows-per-update {asked.rows_per_update}")
    place = Place(asked.device, max(counts) if asked.device == "cuda" else 0)
    specs = [
        Spec(
            engine=name,
            workload=rows,
            layout="packed" if PEERS[name].padding_free else "literal",
            ranks=count,
            batch=min(PEERS[name].batch, asked.rows_per_update // count),
            rows_per_update=asked.rows_per_update,
            model=asked.model,
            precision=asked.precision,
            checkpointing=PEERS[name].checkpointing,
            updates=asked.updates,
            warmup=asked.warmup,
            device=asked.device,
        )
        for rows in asked.workloads.split(",")
        for name in peers
        for count in counts
    ]
    out = asked.out.absolute()
    lines = read(out) if out.exists() else []
    mine: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="glassloop-peers-") as temporary:
        folder = Path(temporary)
        base = base_folder(asked.model, asked.precision, asked.device, folder / "base")
        for number, spec in enumerate(schedule(specs, asked.repeats)):
            work = folder / f"arm-{number}"
            if is_reference(spec.cell):
                if any(_serves(line, spec) for line in lines):
                    continue
                line = run_arm(spec, place, work, timeout_s=asked.timeout)
            else:
                python = pythons.get(PEERS[spec.engine].library, sys.executable)
                line = run_command(spec, peer_command(spec, python, work, base), place, work, timeout_s=asked.timeout)
            line["check"] = checked(line, lines)
            lines.append(line)
            mine.append(line)
            append(out, line)
            print(f"{spec.name}: {line.get('failed') or format(line['tokens_per_s']['real'], ',.0f') + ' tokens/s'}", flush=True)
    print("\n".join(table(mine)))
    return 0 if all(line["check"]["within"] for line in mine) else 1


def _serves(line: dict[str, Any], spec: Spec) -> bool:
    """Whether a known line is the reference that `spec` would measure."""
    same = ("workload", "rows_per_update", "precision", "model", "r")
    return "failed" not in line and is_reference(line["cell"]) and all(line["cell"][name] == spec.cell[name] for name in same)


def peer_command(spec: Spec, python: str, work: Path, base: Path) -> list[str]:
    """How a peer's process is started; with several ranks by Accelerate's launcher, as its own documentation has it."""
    words = [str(Path(__file__).resolve().with_name("peer_arm.py")), str(work / "spec.json"), str(base)]
    if spec.ranks == 1:
        return [python, *words]
    work.mkdir(parents=True, exist_ok=True)
    (work / "launch.yaml").write_text(launch_file(spec.device), encoding="utf-8")
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(work / "launch.yaml")]
    return [python, *launcher, "--num_processes", str(spec.ranks), *words]


def base_folder(model: str, precision: str, device: str, folder: Path) -> Path:
    """A folder with the base in NF4 and its tokenizer, as links into glassloop's cache, where it is made if need be."""
    code = (
        "import contextlib, sys, torch\n"
        "from glassloop.base_cache import load_base\n"
        "from glassloop.base_source import resolve_source\n"
        "from glassloop.config import ModelConfig\n"
        "model = ModelConfig(id=sys.argv[1])\n"
        "device = torch.device(sys.argv[3], 0) if sys.argv[3] == 'cuda' else torch.device('cpu')\n"
        "_, report = load_base(model, precision=sys.argv[2], device=device, first=contextlib.nullcontext)\n"
        "print('FOLDERS', report.folder, resolve_source(model).folder, sep='\\n')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, model, precision, device], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"--model {model} cannot be made: {done.stderr.strip()[-600:]}")
    weights, source = map(Path, done.stdout.rpartition("FOLDERS\n")[2].split("\n")[:2])
    folder.mkdir()
    for file in [*source.iterdir(), *weights.iterdir()]:  # the weights' config.json comes last and stays
        link = folder / file.name
        link.unlink(missing_ok=True)
        link.symlink_to(file)
    return folder


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
