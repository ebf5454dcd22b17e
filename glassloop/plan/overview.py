"""The guesses of `glassloop train`, each with its setting.

A short block.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

from glassloop.plan.outlook import Outlook
from glassloop.plan.render import width
from glassloop.plan.render_cost import LABEL, duration
from glassloop.plan.steps import counted
from glassloop.predict.cpu import Answers, CpuSpeed, answering_s, measuring_s, training_s
from glassloop.predict.flops import flops_of
from glassloop.predict.ledger import ledger_of
from glassloop.predict.terms import GIB

SETTING = 27  # columns of the settings at the right
LIBRARIES_GIB = 1.0  # of a process with torch, transformers and peft loaded
CPU_SPREAD = 1.6  # of a peak that malloc takes: 1.4 and 3.4 GiB were measured for 0.4 and 1.6
FEW = 20  # updates below which a run hardly learns


@dataclass(frozen=True)
class RowFacts:
    """Facts of a run's rows, in words and numbers."""

    source: str
    format: str
    template: str  # with why, if it was chosen
    rows: int
    left_out: Mapping[str, int]  # reason -> rows
    median_tokens: int  # of rows that train
    longest_tokens: int
    cut: int
    supervised_share: float
    heldout: int
    notes: tuple[str, ...] = ()
    longest_read_tokens: int = 0  # before rows were left out or cut


def overview_lines(outlook: Outlook, rows: RowFacts, *, cpu: CpuSpeed | None = None) -> list[str]:
    """Lines of the block: guesses, fit and time.

    Args:
        cpu: for a run on the CPU; None: on GPUs.
    """
    config, plan = outlook.config, outlook.plan
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in rows.left_out.items())
    left = f"; left out: {reasons}" if reasons else ""
    fits, notes = _fits(outlook, on_cpu=cpu is not None)
    base = "4 bits (NF4)" if config.model.quantization == "nf4" else "not quantised"
    guesses = [
        ("model", f"{config.model.id}, {base}, LoRA r = {config.lora.r}", "--model, lora.r"),
        ("rows", f"{rows.rows:,} of {rows.source}{left}", "data.source, data.rows"),
        ("format", rows.format, "data.format, data.columns.*"),
        *(("", note, "") for note in rows.notes),
        ("template", rows.template, "data.template"),
        ("held out", _heldout(rows), "data.heldout"),
        (
            "tokens",
            f"{rows.median_tokens:,} a row (median), {_longest(rows)}; "
            f"{rows.supervised_share:.0%} supervised",
            "data.max_tokens",
        ),
        (
            "update",
            f"{plan.size} rows x {counted(plan.ranks, 'rank')} x {plan.accumulation} = "
            f"{plan.rows_per_update} rows",
            "batch.rows_per_update",
        ),
        (
            "length",
            f"{_epochs(plan.epochs)} = {counted(plan.updates, 'update')}, lr {max(plan.lr):.3g}, "
            f"{plan.warmup} warm up",
            "--epochs, optimizer.lr",
        ),
        ("engine", _engine(outlook, on_cpu=cpu is not None), "execution.engine"),
        ("memory", fits, "batch.size"),
        ("time", _time(outlook, rows, cpu), ""),
    ]
    lines = [f"{'':<{LABEL}}{'guessed or asked':<{_middle()}}change it with"]
    for name, text, setting in guesses:
        lines += _row(name, text, setting)
    if plan.updates < FEW:
        more = -(-FEW * plan.epochs // plan.updates)
        notes.append(
            f"{counted(plan.updates, 'update')} may be few to learn from: --epochs {more:g}"
        )
    for note in notes:
        lines += _row("note", note, "")
    return lines


def _middle() -> int:
    return width() - LABEL - SETTING


def _row(name: str, text: str, setting: str) -> list[str]:
    """A guess and its setting, wrapped between the two columns."""
    room = _middle() - 2 if setting else width() - LABEL
    pieces = textwrap.wrap(text, room, break_on_hyphens=False) or [""]
    first = f"{name:<{LABEL}}{pieces[0]:<{room}}" + (f"  {setting}" if setting else "")
    return [first.rstrip(), *(f"{'':<{LABEL}}{piece}" for piece in pieces[1:])]


def _longest(rows: RowFacts) -> str:
    """The longest row that trains, and the longest that the source has."""
    cut = f", {rows.cut:,} cut" if rows.cut else ""
    known = rows.longest_read_tokens > rows.longest_tokens
    read = f" ({rows.longest_read_tokens:,} in the source)" if known else ""
    return f"{rows.longest_tokens:,} at most{read}{cut}"


def _epochs(epochs: float) -> str:
    return "1 epoch" if epochs == 1 else f"{epochs:.3g} epochs"


def _heldout(rows: RowFacts) -> str:
    if not rows.heldout:
        return "nothing: no evaluation"
    return f"{counted(rows.heldout, 'row')}, never trained on"


def _engine(outlook: Outlook, *, on_cpu: bool) -> str:
    execution = outlook.config.execution
    engine = "peft" if on_cpu and execution.engine == "fused" else execution.engine
    return f"{engine}, {execution.precision}, {execution.layout} passes"


def _fits(outlook: Outlook, *, on_cpu: bool) -> tuple[str, list[str]]:
    """Memory needed of the cards here, with notes."""
    if outlook.shapes is None:
        return "not known", list(outlook.unknown)
    if on_cpu:
        if outlook.work is None:
            return "not predicted", list(outlook.unknown)
        peak = ledger_of(outlook.shapes, outlook.work, "peft").peak_bytes / GIB
        return f"about {CPU_SPREAD * peak + LIBRARIES_GIB:.1f} GiB of the host for each rank", []
    here = outlook.here
    if not here:
        return "not predicted: this card is not in the table", list(outlook.unknown)
    one = min(here, key=lambda verdict: verdict.spare_gib)
    numbers = f"{one.needed_gib:.1f} of {one.has_gib:.1f} GiB free on {one.card}"
    if one.fits:
        return f"fits: {numbers}; {one.least_gib:.1f} would do", []
    cure = f"{one.cure} does" if one.cure else "lower data.max_tokens"
    return f"does NOT fit: {numbers}", [f"{cure}; without it the run shrinks its passes by itself"]


def _time(outlook: Outlook, rows: RowFacts, cpu: CpuSpeed | None) -> str:
    """Predicted time without the start, and on GPUs without evaluations."""
    if cpu is None:
        here = {one.card for one in outlook.here}
        found = [time for time in outlook.times_here if time.card in here]
        if not found:
            return "not predicted for these cards"
        return f"about {duration(max(time.run_s for time in found))} to train, predicted"
    return _cpu_time(outlook, rows, cpu)


def _cpu_time(outlook: Outlook, rows: RowFacts, cpu: CpuSpeed) -> str:
    """Predicted time on a CPU: training, then what evaluations add."""
    counts, shapes, config, plan = outlook.tokens, outlook.shapes, outlook.config, outlook.plan
    if counts is None or shapes is None:
        return "not predicted"
    one = flops_of(
        shapes,
        [(rows.median_tokens, max(1, round(rows.median_tokens * rows.supervised_share)))],
        r=config.lora.most_rank,
        targets=shapes.apart(config.lora.targets),
        checkpointing=config.execution.checkpointing,
    )
    slots = counts.literal_slots if config.execution.layout == "literal" else counts.packed_slots
    train = training_s((one.model + one.recompute) / rows.median_tokens * slots, cpu)
    evaluation = config.evaluation
    every = evaluation.every_updates
    times = 2 + ((plan.updates - 1) // every if every and rows.heldout else 0)
    asked = min(evaluation.generate_rows, rows.heldout) if rows.heldout else evaluation.samples
    answers = Answers(times, asked, evaluation.max_new_tokens)
    read = rows.heldout + asked  # a question is read before it is answered
    more = measuring_s(one.model * read * times, cpu) + answering_s(
        shapes, answers, cpu, ranks=plan.ranks, batch=plan.size
    )
    does = "evaluate and answer" if rows.heldout else "answer samples"
    also = f", at most {duration(more)} more to {does}" if more >= 1 else ""
    return f"about {duration(train)} to train on this CPU{also}"
