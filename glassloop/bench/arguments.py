"""The command line of `glassloop bench`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from glassloop.config.options import Options


def parser() -> argparse.ArgumentParser:
    parser = Options(
        prog="glassloop bench",
        allow_abbrev=False,
        description="Every combination of the lists below is an arm: a process of its own that "
        "does updates by the training loop's own code, on rows of a named workload, with random "
        "weights of the 8B shape unless another model is named (nothing is downloaded). Arms take "
        "turns. A result is shown only if update 1's loss and gradient norm agree with the "
        "reference engine's on the same rows.",
    )
    _add_lists(parser.add_argument_group("arms (lists with commas)"))
    _add_work(parser)
    _add_modes(parser)
    return parser


def _add_lists(lists: argparse._ArgumentGroup) -> None:
    """Options of which every combination is an arm."""
    lists.add_argument(
        "--engines",
        type=_words,
        default=["peft"],
        metavar="E,..",
        help="execution.engine: peft, unsloth, fused (default: peft)",
    )
    lists.add_argument(
        "--workloads",
        type=_words,
        default=["scam-v1", "full-v1"],
        metavar="W,..",
        help="scam-v1, medical-v1, full-v1, or `own`: the rows of data.source=... (default: "
        "scam-v1,full-v1)",
    )
    lists.add_argument(
        "--layouts",
        type=_words,
        default=["literal", "packed"],
        metavar="L,..",
        help="default: literal,packed",
    )
    lists.add_argument(
        "--ranks",
        type=_counts,
        default=[1],
        metavar="N,..",
        help="processes that share an update's rows (default: 1)",
    )
    lists.add_argument(
        "--batch",
        type=_counts,
        default=[2],
        metavar="N,..",
        help="rows of a micro-batch (default: 2)",
    )
    lists.add_argument(
        "--checkpointing",
        type=_words,
        default=["on"],
        metavar="on,off",
        help="activations recomputed or stored (default: on)",
    )
    lists.add_argument(
        "--vary",
        type=_varied,
        action="append",
        default=[],
        metavar="FIELD=A,B",
        help="one more list, of a field of execution or memory: each value is an arm (may be given "
        "several times)",
    )


def _add_work(parser: argparse.ArgumentParser) -> None:
    """Options of the work that all arms share."""
    parser.add_argument(
        "--python",
        type=_python,
        action="append",
        default=[],
        metavar="ENGINE=PATH",
        help="interpreter of an engine's arms, where its packages need an environment of their own",
    )
    parser.add_argument(
        "--rows-per-update",
        type=_count,
        default=8,
        metavar="N",
        help="over all ranks, in every arm (default: 8)",
    )
    parser.add_argument(
        "--model", default="random:llama-8b", help="model.id (default: random:llama-8b)"
    )
    parser.add_argument(
        "--precision", default="bf16", choices=["bf16", "fp16", "fp32"], help="default: bf16"
    )
    parser.add_argument(
        "--updates",
        type=_count,
        default=5,
        metavar="N",
        help="measured updates of an arm (default: 5)",
    )
    parser.add_argument(
        "--warmup", type=_count, default=2, metavar="N", help="updates before them (default: 2)"
    )
    parser.add_argument(
        "--repeats",
        type=_count,
        default=2,
        metavar="N",
        help="times that each arm is run (default: 2)",
    )
    parser.add_argument(
        "--turns",
        type=_count,
        default=0,
        metavar="N",
        help="load all arms of a workload at once; N times, each does its updates while the others "
        "wait",
    )
    parser.add_argument(
        "--device",
        default="auto",
        choices=["auto", "cuda", "cpu"],
        help="auto: cuda where there is a GPU",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="results are added to it (default: benchmarks/results/bench-CARD.jsonl)",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        type=_override,
        metavar="section.field=VALUE",
        help="of every arm's config",
    )


def _add_modes(parser: argparse.ArgumentParser) -> None:
    """Options that do something else than measure arms."""
    parser.add_argument(
        "--profile",
        type=_count,
        metavar="U",
        help="measure nothing: do updates up to U in every arm, and write a trace and a page about "
        "update U",
    )
    parser.add_argument(
        "--profile-dir",
        type=Path,
        default=Path("profiles"),
        metavar="DIR",
        help="with --profile: where to (default: profiles)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the arms in the order of their turns, and run nothing",
    )
    parser.add_argument(
        "--card",
        action="store_true",
        help="one fixed piece of work, at most 3 minutes, one line to paste",
    )
    parser.add_argument(
        "--predict",
        action="store_true",
        help="the card's work by card: measured where results are there, else predicted",
    )
    parser.add_argument(
        "--page",
        type=Path,
        metavar="FILE",
        help="with --predict: measured and predicted speeds of all cards as an HTML page",
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A", "B"),
        help="ratios of two files of results, B / A",
    )
    parser.add_argument(
        "--anyway", action="store_true", help="with --compare: also where the work differs"
    )
    parser.add_argument(
        "--png",
        type=Path,
        metavar="FILE",
        help="with --compare: the bars as a picture too (needs matplotlib)",
    )


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _count(text: str) -> int:
    if not text.isdigit() or text == "0":
        raise argparse.ArgumentTypeError(f"{text}: a whole number from 1 on")
    return int(text)


def _counts(text: str) -> list[int]:
    return [_count(word) for word in _words(text)]


def _override(text: str) -> str:
    if not re.match(r"(--)?[a-z_]+(\.[a-z_0-9]+)+=", text):
        raise argparse.ArgumentTypeError(
            f"{text}: a field of the config is given as section.field=VALUE"
        )
    return text


def _varied(text: str) -> tuple[str, ...]:
    field, _, values = text.removeprefix("--").partition("=")
    if not re.fullmatch(r"(execution|memory)\.[a-z_]+", field) or not _words(values):
        raise argparse.ArgumentTypeError(
            f"{text}: say execution.FIELD=A,B or memory.FIELD=A,B; other sections change the work"
        )
    return tuple(f"{field}={value}" for value in _words(values))


def _python(text: str) -> tuple[str, str]:
    engine, _, path = text.partition("=")
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(
            f"{text}: say ENGINE=/path/to/env/bin/python, a file that exists"
        )
    return engine, str(Path(path).absolute())  # not resolved: an environment's python is a link
