"""Predict updates, learning rates, memory, disk and time of a run."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glassloop.config.options import Options

if TYPE_CHECKING:
    from glassloop.config import Config
    from glassloop.data.dataset import Dataset
    from glassloop.plan.changes import Change
    from glassloop.plan.outlook import Outlook
    from glassloop.plan.steps import StepPlan
    from glassloop.plan.work import TokenCounts
    from glassloop.predict.hardware import Present

NVIDIA = "/proc/driver/nvidia/gpus"  # a folder for each card, where the driver is loaded


def main(argv: list[str]) -> int:
    """`glassloop plan [PRESET] [OPTION] ... [section.field=VALUE] ...`.

    Exit code 0; ValueError for what cannot be planned.
    """
    from glassloop.config.arguments import parse
    from glassloop.predict.hardware import card_here

    own = _parser()
    if {"-h", "--help"} & set(argv):
        own.print_help()
        print("\nAll other words are those of train_loop.py:\n")
    given, words = own.parse_known_args(argv)
    config = parse(words, prog="glassloop plan", cards_here=card_here)
    outlook, notes = look(config, given)
    changes = [
        _changed(one, outlook, given, words) for one in given.compare or _usual_changes(outlook)
    ]
    if given.json:
        from glassloop.plan.outlook import as_plain

        print(
            json.dumps(
                as_plain(outlook) | {"compare": [vars(one) for one in changes], "notes": notes},
                indent=1,
            )
        )
        return 0
    from glassloop.plan.changes import lines_of
    from glassloop.plan.render import launch_line, render, wrapped
    from glassloop.plan.render_cost import LABEL

    lines = [*render(outlook), ""]
    for number, line in enumerate(line for one in changes for line in lines_of(one)):
        lines.append(f"{'change' if number == 0 else '':<{LABEL}}{line}")
    lines += [f"{'note':<{LABEL}}{note}" for note in notes]
    for line in lines:
        print("\n".join(wrapped(line)))
    print(f"{'start':<{LABEL}}{launch_line(outlook, words)}")  # whole, to be copied
    return 0


def _parser() -> argparse.ArgumentParser:
    own = Options(prog="glassloop plan", add_help=False, allow_abbrev=False, description=__doc__)
    own.add_argument(
        "--ranks",
        type=_positive,
        metavar="N",
        help="processes in all (default: batch.ranks, else this machine's GPUs, else 2)",
    )
    own.add_argument(
        "--machines",
        type=_positive,
        default=1,
        metavar="M",
        help="machines that they are spread over (default: 1)",
    )
    own.add_argument(
        "--rows", type=_positive, metavar="N", help="training rows, where nothing else says"
    )
    own.add_argument(
        "--row-tokens", type=float, metavar="T", help="mean tokens of a row, for the time"
    )
    own.add_argument(
        "--with-data",
        action="store_true",
        help="load tokenizer and rows: true counts of rows, tokens and padding",
    )
    own.add_argument("--json", action="store_true", help="print everything as JSON")
    own.add_argument(
        "--compare",
        action="append",
        metavar='"ranks=1"',
        help="what changes with other fields (ranks=N, section.field=VALUE ...)",
    )
    return own


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def look(config: Config, given: argparse.Namespace) -> tuple[Outlook, list[str]]:
    """Build the outlook and the notes beside it.

    Raises:
        ValueError: the number of rows is unknown.
    """
    from glassloop.data.counting import count_rows
    from glassloop.plan.outlook import look_ahead, plan_of
    from glassloop.predict.hardware import gpus_present

    present = gpus_present() if os.path.isdir(NVIDIA) else ()
    ranks, notes = _ranks(config, given, present)
    if ranks % given.machines:
        raise ValueError(
            f"--ranks {ranks} does not spread over --machines {given.machines}: give a multiple"
        )
    counts, rows_from = None, ""
    if given.with_data:
        from glassloop.data.dataset import summary

        seen = measure(config, ranks, present)
        rows, counts, rows_from = len(seen.dataset.train.rows), seen.counts, seen.rows_from
        notes += [*summary(seen.dataset, config.data), *seen.by_source]
    else:
        found = count_rows(config.data, given.rows)
        if found.rows is None:
            raise ValueError(f"how many rows there are is not known: {found.how}")
        rows, rows_from = found.rows, found.how
    plan = plan_of(config, rows, ranks)
    outlook = look_ahead(
        config,
        plan,
        rows_from=rows_from,
        machines=given.machines,
        counts=counts,
        row_tokens=given.row_tokens,
        present=present,
    )
    return outlook, notes


def _ranks(
    config: Config, given: argparse.Namespace, present: Sequence[Present]
) -> tuple[int, list[str]]:
    asked = config.batch.ranks
    if given.ranks is not None:
        if asked is not None and asked != given.ranks:
            raise ValueError(
                f"--ranks {given.ranks}, but batch.ranks = {asked}: a run with other ranks would "
                "be refused; give one of the two"
            )
        return given.ranks, []
    if asked is not None:
        return asked, []
    if present:
        return len(present), [
            f"planned for this machine's {len(present)} GPUs; --ranks N plans for another number"
        ]
    return 2, [
        "no GPU here and batch.ranks is not set: planned for 2 ranks; --ranks N plans for another "
        "number"
    ]


@dataclass(frozen=True)
class Measured:
    """Rows of a run from its own pipeline, with their sums."""

    dataset: Dataset
    plan: StepPlan
    counts: TokenCounts
    rows_from: str
    by_source: tuple[str, ...] = ()  # lines on the parts of a mix


def measure(config: Config, ranks: int, present: Sequence[Present]) -> Measured:
    """Load tokenizer and rows, and count tokens.

    Raises:
        ValueError: the rows are of no use.
    """
    from glassloop.base.tokenizer import load_tokenizer
    from glassloop.data.batches import Batches
    from glassloop.data.reading import read_dataset
    from glassloop.data.token_counts import count_tokens, rows_by_source
    from glassloop.plan.engine import planned_engine
    from glassloop.plan.outlook import plan_of
    from glassloop.plan.work import pass_tokens_for, usual_budget
    from glassloop.predict.shapes import shapes_of

    config, _ = planned_engine(config)  # it decides how large packed passes are
    dataset = read_dataset(config, lambda: load_tokenizer(config.model))
    plan = plan_of(config, len(dataset.train.rows), ranks)
    batches = Batches(
        rows=dataset.train.rows,
        plan=plan,
        seed=config.seed,
        layout=config.execution.layout,
        pass_tokens=pass_tokens_for(
            config, shapes_of(config.model.id)[0], usual_budget(present, ranks)[1]
        ),
        two_passes_every=config.record.probe_every_updates,
    )
    train = dataset.train
    how = (
        f"loaded: {len(train.dropped):,} dropped and {train.cut:,} cut at "
        f"{config.data.max_tokens:,} tokens"
    )
    by_source = tuple(rows_by_source(batches, dataset.loaded.mixed))
    return Measured(dataset, plan, count_tokens(batches), how, by_source)


def _usual_changes(outlook: Outlook) -> list[str]:
    plan = outlook.plan
    return [
        f"ranks={2 if plan.ranks == 1 else 1}",
        f"batch.size={2 * plan.size}",
        f"batch.accumulation={2 * plan.accumulation}",
    ]


def _changed(
    text: str, outlook: Outlook, given: argparse.Namespace, words: Sequence[str]
) -> Change:
    """Read one --compare as a command line; later words replace earlier ones."""
    from glassloop.config.arguments import parse
    from glassloop.plan.changes import Change, change
    from glassloop.plan.outlook import plan_of
    from glassloop.predict.hardware import card_here

    ranks, fields = outlook.plan.ranks, []
    for word in text.replace(",", " ").split():
        number = re.fullmatch(r"(?:batch\.)?ranks=(\d+)", word)
        if number:
            ranks = int(number.group(1))
        else:
            fields.append(word)
    if not ranks:
        raise ValueError(f'--compare "{text}": a run has at least one rank')
    try:
        config = outlook.config
        if fields:
            config = parse(_over(words, fields), prog="glassloop plan", cards_here=card_here)
        other = plan_of(config, outlook.plan.rows, ranks)
    except ValueError as error:
        return Change(text, refused=str(error).replace("\n", "; "))
    return change(
        text,
        outlook.plan,
        other,
        rows_kept_by=f"batch.rows_per_update={outlook.plan.rows_per_update}",
    )


def _over(words: Sequence[str], fields: Sequence[str]) -> list[str]:
    """Put fields over the command line.

    Of the two names for an update's rows, the later one replaces the earlier.
    """
    pair = ("batch.accumulation", "batch.rows_per_update")
    if not any(field.lstrip("-").startswith(pair) for field in fields):
        return [*words, *fields]
    kept, value_follows = [], False
    for word in words:
        dropped = word.lstrip("-").startswith(pair)
        if not (dropped or value_follows):
            kept.append(word)
        value_follows = dropped and "=" not in word
    return [*kept, *fields]
