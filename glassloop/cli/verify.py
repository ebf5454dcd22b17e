"""Prove the loop's math on this machine, and that faults are noticed."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glassloop.config.options import Options

PATIENCE_S = {"cpu": 120.0, "cuda": 400.0}  # a GPU's first use can take minutes on a slow host


def main(argv: list[str]) -> int:
    """`glassloop verify [--json] [--against OLD.json] [--device D] [--only TEXT]`.

    Exit code 0: all agree and are caught; 1: not; 2: refused.
    """
    asked = _parser().parse_args(argv)
    if "LOCAL_RANK" in os.environ:
        raise ValueError(
            "glassloop verify starts its own processes: run it without accelerate launch"
        )
    from glassloop.verify import against
    from glassloop.verify.problem import problem_id

    old = None
    if asked.against is not None:
        old = against.read(asked.against)
        against.require_comparable(old, problem_id(), asked.against)
    return verify(asked, old)


def _parser() -> argparse.ArgumentParser:
    parser = Options(
        prog="glassloop verify",
        allow_abbrev=False,
        description="Trains a tiny random Llama for a few updates in every way that glassloop has: "
        "layouts, one and two ranks, both reductions, stored and recomputed activations, every "
        "installed engine, NF4 and unquantised. Each is compared with the formula in plain "
        "transformers. Then come deliberate faults, each of which must be noticed. Nothing is "
        "downloaded.",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print all numbers, versions and the machine as JSON instead of the table",
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="OLD.json",
        help="say which losses and norms moved since that --json output",
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto: cuda where there is a GPU",
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only members and mutants whose name holds TEXT"
    )
    parser.add_argument(
        "--patience",
        type=float,
        metavar="SECONDS",
        help="give up when a process has said nothing for so long; a collective waits half of it "
        f"(default: {PATIENCE_S['cpu']:g}, on a GPU {PATIENCE_S['cuda']:g})",
    )
    return parser


def verify(asked: argparse.Namespace, old: dict[str, Any] | None) -> int:
    """Run everything in a temporary folder, print, and return the exit code.

    Raises ValueError for a device that is not there.
    """
    from glassloop.verify import against, results
    from glassloop.verify.processes import PartFailed

    started = time.monotonic()
    device, gpus = _device(asked.device)
    asked.patience = asked.patience or PATIENCE_S[device]
    shared = " (both ranks on the one GPU, over gloo)" if gpus == 1 else ""
    _say(
        f"two parts side by side on {device}{shared}; one is given up when it says nothing for "
        f"{asked.patience:g} s"
    )
    with _ended_by_signals(), tempfile.TemporaryDirectory(prefix="glassloop-verify-") as name:
        try:
            found = _run(Path(name), device, gpus, asked)
        except PartFailed as error:
            print(f"failed: {error}", file=sys.stderr)
            return 1
    verdicts = found.pop("verdicts")
    seconds = time.monotonic() - started
    good = all(v.good for v in verdicts)
    output = found | {
        "device": device,
        "gpus": gpus,
        "seconds": round(seconds, 1),
        "only": asked.only,
        "marks": results.MARKS,
    }
    closing = [results.summary(verdicts, seconds)]
    if old is not None:
        moved = against.moves(
            old["fingerprint"],
            found["fingerprint"],
            shared_only=bool(asked.only or old.get("only")),
        )
        total = sum(len(series) for series in found["fingerprint"].values())
        closing += against.lines(moved, total, old, output)
        output["against"] = [vars(move) for move in moved]
        good = good and not any(move.beyond_rounding for move in moved)
    output |= {"good": good, "verdicts": [results.as_plain(v) for v in verdicts]}
    if asked.json:
        print(results.to_json(output))
        _say("\n".join([*results.table([v for v in verdicts if not v.good]), *closing]))
    else:
        print("\n".join([*results.table(verdicts), "", *closing]))
    return 0 if good else 1


def _run(folder: Path, device: str, gpus: int, asked: argparse.Namespace) -> dict[str, Any]:
    """Make the problem, run both parts, judge.

    Returns verdicts, fingerprint and where all that took place.
    """
    from glassloop.verify import problem, results
    from glassloop.verify.against import SCHEMA
    from glassloop.verify.processes import parts, run_parts

    problem.write_model(folder / "model")
    problem.write_rows(folder / "rows.jsonl")
    (folder / "asked.json").write_text(
        json.dumps(
            {
                "backend": "gloo" if gpus == 1 else "auto",
                "only": asked.only,
                "collective_timeout_s": max(1, int(asked.patience / 2)),
            }
        )
    )
    run_parts(parts(folder, device, gpus), patience_s=asked.patience, say=_say, cwd=folder)
    verdicts, fingerprint, environment = results.judge(folder)
    if not verdicts:
        raise ValueError(
            f"--only {asked.only}: no member and no mutant has that in its name; run without "
            "--only to see them all"
        )
    return {
        "schema": SCHEMA,
        "problem": problem.problem_id(),
        "versions": environment["packages"],
        "machine": {
            name: value
            for name, value in environment.items()
            if name not in ("schema", "packages", "command")
        },
        "fingerprint": fingerprint,
        "verdicts": verdicts,
    }


def _device(asked: str) -> tuple[str, int]:
    """("cpu" | "cuda", GPUs to use).

    Raises ValueError where a GPU is asked for and there is none.
    """
    if asked == "cpu":
        return "cpu", 0
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus == 0 and asked == "cuda":
        raise ValueError("--device cuda: torch sees no CUDA device; use --device cpu")
    return ("cuda", min(gpus, 2)) if gpus else ("cpu", 0)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM end the block as an exception does."""

    def leave(number: int, _frame: Any) -> None:
        raise SystemExit(128 + number)

    kept = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, kept)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
