"""Compare adapter and base on held-out rows, with 95 % intervals."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from glassloop.cli.generate import add_run_options, overrides_of
from glassloop.config.options import Options

if TYPE_CHECKING:
    from glassloop.use.measuring import Report, Score

SCHEMA = 1
FOLDER = "evaluated"  # in the run's folder: results, no row's text
NAMES = {"loss_nats": "loss, nats a token"}


def main(argv: list[str]) -> int:
    """`glassloop evaluate RUN [--data SOURCE]`.

    Exit code 0; 2 for refused input.
    """
    own = Options(
        prog="glassloop evaluate",
        allow_abbrev=False,
        description="The adapter and its base on the same rows: loss over all, verdicts of greedy "
        "answers if rows have labels.",
        epilog="The result goes into RUN/evaluated/, from where push takes it. "
        "On several GPUs: accelerate launch --config_file accelerate_configs/ddp_2gpu.yaml -m "
        "glassloop.cli evaluate RUN",
    )
    add_run_options(own)
    own.add_argument(
        "--data",
        metavar="SOURCE",
        help="rows to measure on instead of the run's held-out ones: file, folder, hub id",
    )
    own.add_argument(
        "--columns",
        metavar="ROLE=NAME,...",
        help="columns of --data where they differ: dialogue=text,label=is_scam",
    )
    own.add_argument("--split", help="split of --data, or another split of the run's own source")
    own.add_argument("--rows", type=int, metavar="N", help="the first N of them")
    own.add_argument(
        "--answers",
        type=int,
        metavar="N",
        help="answer the first N rows, 0 for none (default: all that have labels)",
    )
    own.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="longest answer (default: the run's evaluation.max_new_tokens)",
    )
    own.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="rows of a pass on a rank (default: the run's batch.size)",
    )
    own.add_argument("--json", action="store_true", help="print one JSON object")
    given = own.parse_args(argv)
    for name, least in (("rows", 1), ("answers", 0), ("max_new_tokens", 1), ("batch", 1)):
        if (value := getattr(given, name)) is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: it must be {least} or more")
    return run(given, columns_of(given.columns))


def columns_of(text: str | None) -> dict[str, str]:
    """{"dialogue": "text"} of "dialogue=text,label=is_scam".

    Raises ValueError naming the word and the roles that there are.
    """
    from glassloop.config import Columns

    found = {}
    for word in (text or "").split(",") if text else ():
        role, equals, name = word.strip().partition("=")
        if not equals or role not in Columns.model_fields:
            raise ValueError(
                f"--columns {text}: {word.strip()!r} is not ROLE=NAME with a ROLE of "
                f"{', '.join(Columns.model_fields)}"
            )
        found[role] = name
    return found


def run(given: argparse.Namespace, columns: dict[str, str]) -> int:
    from glassloop.formula.dist import in_turn, leave, one_first
    from glassloop.loop.launch import check_launch, hush, make_accelerator, on_cuda
    from glassloop.use.loaded import load, setup_of
    from glassloop.use.trained import load_tokenizer_of, open_trained, template_of

    trained = open_trained(given.run, given.at, overrides_of(given))
    config = trained.config
    batch = config.batch.model_copy(
        update={"ranks": None, "rows_per_update": None, "accumulation": 1}
    )
    # A CPU has no fp16: load() computes in fp32 there, and says so.
    has_fp16 = on_cuda() or config.execution.precision != "fp16"
    execution = config.execution.model_copy(
        update={"engine": "peft", **({} if has_fp16 else {"precision": "fp32"})}
    )
    config = config.model_copy(update={"batch": batch, "execution": execution})
    check_launch(config)
    accelerator = make_accelerator(config)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    hush(rank)

    from glassloop.loop.replica import device_of
    from glassloop.use.heldout import rows_of
    from glassloop.use.measuring import measure, report_of

    device = device_of(accelerator)

    def first() -> Any:
        return one_first(accelerator.is_local_main_process)

    def read() -> Any:
        tokenizer = load_tokenizer_of(trained)
        template = template_of(trained, tokenizer)
        found = rows_of(
            trained,
            template,
            source=given.data,
            split=given.split,
            rows=given.rows,
            columns=columns,
        )
        return tokenizer, template, found

    tokenizer, template, rows = in_turn(first, read, "reading tokenizer and data")
    loaded = load(trained, device, first=first)
    started = time.perf_counter()
    labelled = [example for example in rows.examples if example.label is not None]
    answered = labelled if given.answers is None else rows.examples[: given.answers]
    setup = setup_of(
        loaded,
        template,
        tokenizer,
        batch_size=given.batch or config.batch.size,
        max_new_tokens=given.max_new_tokens or config.evaluation.max_new_tokens,
    )
    setup = dataclasses.replace(setup, rank=rank, ranks=ranks)
    measured = measure(loaded, rows.rows, answered, setup)
    if rank == 0:
        report = report_of(measured, config.seed)
        took = time.perf_counter() - started
        found = as_object(trained, rows.name, report, took, ranks, given, loaded.precision)
        notes = (*trained.notes, *loaded.notes, *rows.notes)
        head = [f"adapter   {trained.checkpoint}, {trained.why}", f"rows      {rows.name}"]
        text = [*head, *(f"          {note}" for note in notes), *lines(report, found)]
        print(json.dumps(found) if given.json else "\n".join(text), flush=True)
        saved = save(trained, found)  # last: a disk that refuses it loses nothing
        if not given.json or saved.startswith("nowhere"):
            print(f"saved     {saved}", file=sys.stderr if given.json else sys.stdout)
    leave()
    return 0


def as_object(
    trained: Any,
    name: str,
    report: Report,
    seconds: float,
    ranks: int,
    given: argparse.Namespace,
    precision: str,
) -> dict[str, Any]:
    """Plain values, no row's text."""
    from glassloop.use.trained import adapter_hash

    return {
        "schema": SCHEMA,
        "update": trained.state.update,
        "checkpoint": trained.checkpoint.name,
        "adapter": adapter_hash(trained),
        "data": name,
        "own_heldout": given.data is None and given.split is None,
        "precision": precision,
        "max_new_tokens": given.max_new_tokens or trained.config.evaluation.max_new_tokens,
        "ranks": ranks,
        "seconds": seconds,
        **dataclasses.asdict(report),
    }


def save(trained: Any, found: dict[str, Any]) -> str:
    """Write one file an evaluation into the run's folder.

    Returns its path, or "nowhere" and why.
    """
    from glassloop.disk.opening import NotPlain, require_plain_folder
    from glassloop.disk.publish import make, write_json

    if trained.run is None:
        return "nowhere: the checkpoint stands alone"
    folder = trained.run / FOLDER
    path = folder / f"{trained.checkpoint.name}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    try:
        require_plain_folder(folder)
        make(folder)
        write_json(path, found)
    except OSError as error:
        return f"nowhere, so push will not find it: {folder} cannot be written ({error.strerror})"
    except NotPlain as error:
        return f"nowhere, so push will not find it: {error}"
    return os.path.relpath(path)


def lines(report: Report, found: dict[str, Any]) -> list[str]:
    """A table for people."""
    told = [
        f"          {report.rows} rows, {report.supervised_tokens:,} supervised tokens; "
        f"{report.answered} answered greedily (at most {found['max_new_tokens']} tokens), "
        f"{report.verdict_rows} of them with a label",
        f"{'':<20}{'base':>25}{'adapter':>25}   adapter - base",
    ]
    took = f"took {found['seconds']:.1f} s on {found['ranks']} rank" + (
        "s" if found["ranks"] > 1 else ""
    )
    return [*told, *(score_line(score) for score in report.scores), *footnotes(report), took]


def score_line(score: Score) -> str:
    cells = []
    for side in ("base", "adapter"):
        value, interval = score.values[side], score.intervals[side]
        cells.append(
            "-"
            if value is None
            else f"{value:.4f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")
        )
    base, adapter = score.values["base"], score.values["adapter"]
    difference = "-" if base is None or adapter is None else f"{adapter - base:+.4f}"
    if score.difference is not None:
        difference += f" [{score.difference[0]:+.3f}, {score.difference[1]:+.3f}]"
    if score.p is not None:
        difference += f", p = {score.p:.3g}"
    return f"{NAMES.get(score.name, score.name):<20}{cells[0]:>25}{cells[1]:>25}   {difference}"


def footnotes(report: Report) -> list[str]:
    told = [
        "[95 % interval]: loss, F1 and differences by bootstrap over rows (2,000 draws, paired), "
        "shares by Wilson; p: exact McNemar"
    ]
    names = [score.name for score in report.scores if None in score.values.values()]
    if "precision" in names:
        told.append("precision -: no answer says scam")
    if "recall" in names:
        told.append("recall -: no row is labelled scam")
    for side, counts in report.counts.items():
        if report.verdict_rows and counts.get("no_verdict"):
            told.append(
                f"{side}: {counts['no_verdict']:.0%} of its answers have no verdict; that counts "
                "as wrong"
            )
    return told
