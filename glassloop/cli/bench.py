"""Measure throughput and memory of arms, compare results, test a card."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ON_OFF = {"on": True, "off": False}


def main(argv: list[str]) -> int:
    """`glassloop bench [OPTION] ... [section.field=VALUE] ...`.

    Exit code 0; 1 where an arm failed or did not pass its check, or rows could not be compared;
    ValueError for what is refused.
    """
    from glassloop.bench.arguments import parser

    asked = parser().parse_args(argv)
    if "LOCAL_RANK" in os.environ:
        raise ValueError(
            "glassloop bench starts its own processes: run it without accelerate launch, and say "
            "--ranks"
        )
    if asked.page is not None and not asked.predict:
        raise ValueError(f"--page {asked.page} goes with --predict: add --predict")
    if asked.compare:
        return _compare(asked)
    if asked.predict:
        return _predict(asked.page)
    return _card(asked) if asked.card else _matrix(asked)


def _place(device: str) -> Any:
    """Raises ValueError where a GPU is asked for and there is none."""
    from glassloop.bench.processes import Place

    if device == "cpu":
        return Place("cpu", 0)
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus == 0 and device == "cuda":
        raise ValueError("--device cuda: torch sees no CUDA device; use --device cpu")
    return Place("cuda", gpus) if gpus else Place("cpu", 0)


def _matrix(asked: argparse.Namespace) -> int:
    from glassloop.bench.matrix import run_in_turns, run_matrix, schedule, specs_of
    from glassloop.bench.table import table
    from glassloop.bench.workloads import OWN, QUANTILES
    from glassloop.config import ENGINES

    if unknown := [name for name in asked.workloads if name not in (*QUANTILES, OWN)]:
        raise ValueError(
            f"--workloads {', '.join(unknown)}: there are {', '.join(QUANTILES)}, and {OWN} for "
            "data.source=..."
        )
    if unknown := [name for name in asked.engines if name not in ENGINES]:
        raise ValueError(f"--engines {', '.join(unknown)}: there are {', '.join(ENGINES)}")
    has_source = any(text.removeprefix("--").startswith("data.source=") for text in asked.overrides)
    if has_source != (OWN in asked.workloads) or (has_source and asked.workloads != [OWN]):
        raise ValueError(
            f"--workloads {OWN} and data.source=... belong together, and other workloads have rows "
            "of their own"
        )
    if unknown := [word for word in asked.checkpointing if word not in ON_OFF]:
        raise ValueError(f"--checkpointing {', '.join(unknown)}: say on, off or on,off")
    place = _place(asked.device)
    specs = specs_of(
        engines=asked.engines,
        workloads=asked.workloads,
        layouts=asked.layouts,
        ranks=asked.ranks,
        batches=asked.batch,
        checkpointing=[ON_OFF[word] for word in asked.checkpointing],
        place=place,
        common=dict(
            rows_per_update=asked.rows_per_update,
            model=asked.model,
            precision=asked.precision,
            updates=asked.updates,
            warmup=asked.warmup,
            turns=asked.turns,
            overrides=tuple(_anywhere(text) for text in asked.overrides),
        ),
        varied=[tuple(fields) for fields in itertools.product(*asked.vary)],
    )
    order = specs if asked.profile else schedule(specs, 1 if asked.turns else asked.repeats)
    if asked.dry_run:
        print(
            "\n".join(
                f"{number:>3}  {spec.name}, {spec.warmup} + {spec.updates} updates"
                for number, spec in enumerate(order, 1)
            )
        )
        return 0
    pythons = dict(asked.python)
    if asked.profile:
        return _profiles(order, place, asked.profile, asked.profile_dir.absolute(), pythons)
    out = (asked.out or _default_out(place.device)).absolute()
    _say(f"{len(order)} arms on {place.device}; results are added to {out}")
    with tempfile.TemporaryDirectory(prefix="glassloop-bench-") as folder:
        run = run_in_turns if asked.turns else run_matrix
        lines = run(order, place, Path(folder), out, _say, pythons)
    print("\n".join(table(lines)))
    # An engine that is not there is told and no fault, unless nothing else was measured.
    tried = [line for line in lines if not line.get("left_out")]
    measured = any(not line.get("check_only") for line in tried)
    return 0 if measured and all(line["check"]["within"] for line in tried) else 1


def _anywhere(text: str) -> str:
    """Make data.source=FILE absolute, so that it holds in an arm's own folder."""
    name, _, value = text.partition("=")
    source = Path(value).expanduser()
    return (
        f"{name}={source.absolute()}"
        if name.removeprefix("--") == "data.source" and source.exists()
        else text
    )


def _profiles(
    specs: Sequence[Any], place: Any, update: int, into: Path, pythons: Mapping[str, str]
) -> int:
    """Profile update `update` of every arm in turn; also print the pages."""
    from glassloop.bench.matrix import unable
    from glassloop.bench.processes import run_arm

    code = 0
    with tempfile.TemporaryDirectory(prefix="glassloop-bench-") as folder:
        for number, spec in enumerate(specs, start=1):
            name = re.sub(r"[^a-z0-9]+", "-", f"{spec.name} update {update}".lower())
            spec = replace(spec, profile=update, profile_dir=str(into / name))
            why = unable(spec, pythons)
            python = pythons.get(spec.engine, sys.executable)
            line: dict[str, Any] = (
                {"failed": why}
                if why
                else run_arm(spec, place, Path(folder) / str(number), python=python)
            )
            if "failed" in line:
                _say(f"{'left out' if why else 'failed'}: {spec.name}: {line['failed']}")
                code = code if why else 1
                continue
            print(Path(line["profile"]["summary"]).read_text(encoding="utf-8"))
            _say(
                f"written: {line['profile']['trace']} (open it in https://ui.perfetto.dev), "
                f"{line['profile']['summary']}"
            )
    return code


def _card(asked: argparse.Namespace) -> int:
    from glassloop.bench.card import NAME, TIME_LIMIT_S, card_line, card_spec, loss_verdict
    from glassloop.bench.processes import run_arm
    from glassloop.bench.results import append

    place = _place("auto")
    spec = card_spec(place, asked.ranks[0])
    out = (asked.out or _default_out("cuda")).absolute()
    _say(
        f"{NAME}: {spec.name}, {spec.warmup} + {spec.updates} updates of {spec.rows_per_update} "
        f"rows; at most {TIME_LIMIT_S:.0f} s"
    )
    with tempfile.TemporaryDirectory(prefix="glassloop-bench-") as folder:
        line = run_arm(spec, place, Path(folder) / "card", timeout_s=TIME_LIMIT_S)
    if "failed" in line:
        print(f"failed: {line['failed']}", file=sys.stderr)
        return 1
    # The engine is the reference itself; weights and rows are the same bits on every card, so its
    # loss can be held to other cards' lines.
    verdict = loss_verdict(line)
    append(
        out,
        line
        | {
            "card_name": NAME,
            "loss_verdict": verdict,
            "check": {"within": True, "why": "it is the reference engine"},
        },
    )
    _say(f"added to {out}")
    print(card_line(line))
    return 1 if verdict.startswith("DIFFERS") else 0


def _predict(page: Path | None) -> int:
    from glassloop.bench.card import measured_cards, predictions
    from glassloop.bench.results import read

    lines: list[dict[str, Any]] = []
    for file in sorted(_results_folder().glob("bench-*.jsonl")):
        lines += read(file)
    print("\n".join(predictions(measured_cards(lines))))
    if page is not None:
        from glassloop.bench.cards_page import cards_page

        page.write_text(cards_page(lines), encoding="utf-8")
        print(f"written: {page}")
    return 0


def _compare(asked: argparse.Namespace) -> int:
    from glassloop.bench.results import read
    from glassloop.bench.table import bars, compare, left_out, png

    before, after = (read(file) for file in asked.compare)
    lines, whole = compare(before, after, anyway=asked.anyway)
    print("\n".join([f"A: {asked.compare[0]}", f"B: {asked.compare[1]}", *lines, *left_out(after)]))
    named = [("A", before), ("B", after)]
    print("\n".join(["", *bars(named)]))
    if asked.png is not None:
        png(named, asked.png)
        print(f"written: {asked.png}")
    return 0 if whole else 1


def _results_folder() -> Path:
    """Return the checkout's benchmarks/results, or the working folder without one."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
    return folder if folder.is_dir() else Path()


def _default_out(device: str) -> Path:
    name = "cpu"
    if device == "cuda":
        import torch

        name = torch.cuda.get_device_name(0).lower().removeprefix("nvidia ")
    return _results_folder() / f"bench-{re.sub(r'[^a-z0-9]+', '-', name).strip('-')}.jsonl"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
