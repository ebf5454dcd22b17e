"""An outlook in sentences, tables and one small plot.

It is as wide as the terminal.
"""

from __future__ import annotations

import math
import shlex
import shutil
import textwrap
from collections.abc import Sequence
from itertools import pairwise

from glassloop.config import ALL_LINEAR
from glassloop.plan.outlook import Outlook, early_end, overridden
from glassloop.plan.render_cost import (
    LABEL,
    base_lines,
    card_lines,
    memory_lines,
    row_lines,
    time_lines,
)
from glassloop.plan.steps import StepPlan, counted
from glassloop.plan.targets import reach_in_words
from glassloop.plan.work import TokenCounts, chooses_passes
from glassloop.predict.shapes import Shapes

NARROWEST, WIDEST = 60, 120  # columns that are ever used
PLOT_HEIGHT = 8


def width() -> int:
    """Columns to write in: the terminal's, 80 without one."""
    return min(WIDEST, max(NARROWEST, shutil.get_terminal_size((80, 24)).columns))


def render(outlook: Outlook) -> list[str]:
    """All lines of `glassloop plan`."""
    lines = [*_steps(outlook), "", *_lr(outlook.plan), "", *_size(outlook)]
    if outlook.tokens is not None:
        lines += ["", *_tokens(outlook.tokens, outlook)]
    if outlook.ledger is not None:
        lines += ["", *memory_lines(outlook), "", *card_lines(outlook), *base_lines(outlook)]
        lines += ["", *row_lines(outlook)] if outlook.config.execution.engine == "fused" else []
        lines += ["", *time_lines(outlook)] if outlook.times else []
    return lines + [f"{'unknown':<{LABEL}}{text}" for text in outlook.unknown]


def wrapped(line: str) -> list[str]:
    """Cut a line to the terminal's width.

    Pieces after the first stand below its text.
    """
    if len(line) <= width():
        return [line]
    indent = " " * (LABEL + (len(line[LABEL:]) - len(line[LABEL:].lstrip())) + 2)
    return textwrap.wrap(
        line,
        width(),
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )


def launch_line(outlook: Outlook, words: Sequence[str]) -> str:
    """The command that starts the planned processes."""
    ranks, machines = outlook.plan.ranks, outlook.machines
    if outlook.config.execution.precision == "fp32":
        file = "cpu_2proc"  # what no one asks of a GPU
        count = "" if ranks == 2 and machines == 1 else f" --num_processes {ranks}"
    else:
        file = "single_gpu" if ranks == 1 else "ddp_2gpu"
        count = "" if ranks <= 2 and machines == 1 else f" --num_processes {ranks}"
    if machines > 1:
        count += f" --num_machines {machines} --machine_rank R"
        count += " --main_process_ip ADDRESS --main_process_port 29500"
    return (
        f"accelerate launch --config_file accelerate_configs/{file}.yaml{count} train_loop.py "
        f"{shlex.join(words)}"
    )


def epoch_sentence(plan: StepPlan) -> str:
    """Rows as updates of an epoch, in a sentence.

    It says what a formula that rounds down would leave out.
    """
    full, rest, per = plan.full_windows, plan.tail_rows, plan.rows_per_update
    exact = f"{plan.rows:,} / {per} = {plan.rows / per:.10g}"
    whole, more = counted(full, "update"), counted(full + 1, "update")
    left = counted(rest, "row")
    if not rest:
        return f"{exact}: {whole} an epoch, no tail"
    if plan.tail == "keep":
        return (
            f"{exact}: {counted(full, 'full window')} and a tail of {left} = {more} an "
            f"epoch; rounding down to {full} "
            f"would leave {left} out"
        )
    return (
        f"{exact}: {whole} an epoch; batch.tail=drop leaves {left} of each epoch out (keep: {more})"
    )


def _steps(outlook: Outlook) -> list[str]:
    plan, config = outlook.plan, outlook.config
    per_machine = (
        f", {plan.ranks // outlook.machines} on each of {outlook.machines} machines"
        if outlook.machines > 1
        else ""
    )
    packed = config.execution.layout == "packed"
    limit = config.execution.pass_tokens or config.batch.size * config.data.max_tokens
    if chooses_passes(config) and outlook.work is not None:
        limit = outlook.work.tokens
    if packed and outlook.tokens is not None:
        mean = outlook.tokens.packed_passes / plan.updates / plan.ranks
        how = (
            f"packed, passes of at most {limit:,} tokens: {mean:.1f} passes a rank and update, "
            f"not {plan.accumulation}"
        )
    elif config.execution.layout == "split":
        how = (
            f"split, passes of at most {limit:,} tokens that "
            f"{counted(plan.ranks, 'rank')} compute together, each a part of every row"
        )
    elif packed:
        how = (
            f"packed, the same rows in passes of at most {limit:,} tokens (--with-data counts them)"
        )
    else:
        how = (
            f"literal: {counted(plan.accumulation, 'pass')} of "
            f"{counted(plan.size, 'row')} on each of {counted(plan.ranks, 'rank')}"
        )
        if plan.tail_rows and plan.tail == "keep":
            chunks = -(-plan.tail_rows // plan.size)
            most = -(-chunks // plan.ranks)
            how += f"; the tail's {counted(plan.tail_rows, 'row')}: {counted(chunks, 'pass')} "
            how += f"over the ranks, at most {most} a rank"
    if plan.times_trained is None:
        seen = (
            f"{plan.rows_trained:,} rows trained on in all; which rows tails leave out differs by "
            "epoch"
        )
    else:
        often = ", ".join(
            f"{counted(rows, 'row')} {_times(times)}"
            for times, rows in sorted(plan.times_trained.items(), reverse=True)
        )
        seen = f"{counted(plan.rows_trained, 'row')} trained on in all: {often}"
    asked = (
        f"{plan.size} x {plan.ranks} x {plan.accumulation} (rows x ranks x micro-batches) = "
        f"{plan.rows_per_update} rows an update"
    )
    activations = "recomputed" if config.execution.checkpointing else "stored"
    if config.execution.engine == "fused" and config.execution.checkpointing:
        activations = f"kept as memory.profile={config.memory.profile} allows"
    if chooses_passes(config) and outlook.work is not None:
        how += f", on a card like {outlook.usual}; others have room for others"
    rows = [
        ("rows", f"{plan.rows:,} ({outlook.rows_from})"),
        ("asked", asked + per_machine),
        ("executed", f"{how}; {config.execution.reduction} reduction, activations {activations}"),
        ("engine", outlook.engine),
        ("epoch", epoch_sentence(plan)),
        (
            "run",
            f"{counted(plan.updates, 'update')} = {plan.epochs:.2f} epochs{overridden(config)}"
            f"{early_end(config)}",
        ),
        ("", seen),
    ]
    return [f"{name:<{LABEL}}{text}" for name, text in rows]


def _times(times: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(times, f"{times} times")


def shown_updates(updates: int, warmup_end: int) -> list[int]:
    """Updates of the lr table: the warmup, about ten more, the last."""
    step = max(1, math.ceil((updates - warmup_end) / 10))
    return sorted(
        {
            *range(1, min(warmup_end, 6) + 1),
            warmup_end,
            *range(warmup_end, updates + 1, step),
            updates,
        }
    )


def _lr(plan: StepPlan) -> list[str]:
    peak_at = plan.lr.index(max(plan.lr)) + 1
    cells = [f"{u:>4}: {plan.lr[u - 1]:.3e}" for u in shown_updates(plan.updates, peak_at)]
    many = (width() - LABEL + 2) // (len(cells[0]) + 2)
    table = [
        f"{'lr' if start == 0 else '':<{LABEL}}" + "  ".join(cells[start : start + many])
        for start in range(0, len(cells), many)
    ]
    return [*table, *plot(plan.lr)]


def plot(values: Sequence[float]) -> list[str]:
    """Plot a column an update, from 0 to the largest value.

    If there are more updates than fit, a column is the largest of several.
    """
    wide = min(width() - LABEL - 2, len(values))
    bounds = [round(i * len(values) / wide) for i in range(wide + 1)]
    columns = [max(values[start:end]) for start, end in pairwise(bounds)]
    top = max(values)
    heights = [
        0 if top == 0 else max(int(value > 0), round(value / top * PLOT_HEIGHT))
        for value in columns
    ]
    lines = []
    for level in range(PLOT_HEIGHT, 0, -1):
        label = (
            f"{top * level / PLOT_HEIGHT:.1e}" if level in (PLOT_HEIGHT, PLOT_HEIGHT // 2) else ""
        )
        lines.append(
            f"{label:>{LABEL - 1}} |"
            + "".join("*" if height >= level else " " for height in heights).rstrip()
        )
    last = str(len(values)) if len(values) > 1 else ""
    axis = f"{'update':>{LABEL - 1}} +1" + last.rjust(max(len(last), wide - 1))
    return [*lines, axis.rstrip()]


def _size(outlook: Outlook) -> list[str]:
    config, n = outlook.config, outlook.trainable
    if n is None or outlook.shapes is None or outlook.checkpoint_bytes is None:
        return [f"{'trains':<{LABEL}}not known, see below"]
    keep = config.checkpoint.keep + (0 if config.data.heldout is None else 1)
    return [
        f"{'trains':<{LABEL}}{n:,} parameters: r = {config.lora.r} x (in + out) of "
        f"{', '.join(config.lora.targets)}",
        *(f"{'':<{LABEL}}{one}" for one in config.lora.exceptions),
        f"{'':<{LABEL}}in {outlook.shapes.layers} layers of {outlook.shapes.name} "
        f"({outlook.shapes.weights:,} weights)",
        *_reach(outlook.shapes, config.lora.targets),
        *([f"{'':<{LABEL}}{of_b}"] if (of_b := config.optimizer.b_in_words) else []),
        f"{'disk':<{LABEL}}{outlook.checkpoint_bytes / 2**20:,.0f} MiB a checkpoint (adapter "
        f"fp32, {config.optimizer.name}'s state, tokenizer); "
        f"at most {keep} kept",
    ]


def _reach(shapes: Shapes, targets: tuple[str, ...]) -> list[str]:
    """A line on linear weights without an adapter, if there are any."""
    there = shapes.linear_layers
    missed = [] if ALL_LINEAR in targets else [name for name in there if name not in targets]
    sizes = {name: inner * outer * shapes.layers for name, (inner, outer) in there.items()}
    said = reach_in_words(sum(sizes[name] for name in missed), sum(sizes.values()), missed)
    return [f"{'':<{LABEL}}{said}"] if said else []


def _tokens(counts: TokenCounts, outlook: Outlook) -> list[str]:
    saved = 1 - counts.packed_slots / counts.literal_slots
    layout = outlook.config.execution.layout
    texts = [
        f"{counts.real:,} real, {counts.supervised:,} supervised "
        f"({counts.supervised / counts.real:.1%}), over {outlook.plan.updates} updates",
        f"literal: {counts.literal_slots:,} places in {counts.literal_passes:,} passes, "
        f"{counts.padding_share:.1%} padding",
        f"packed:  {counts.packed_slots:,} places in {counts.packed_passes:,} passes, no padding: "
        f"{saved:.1%} fewer places",
        f"heaviest pass ({layout}): {counts.heaviest_rows} x {counts.heaviest_tokens:,} places, "
        f"{counts.heaviest_supervised:,} supervised",
    ]
    if outlook.plan.ranks > 1:
        texts.append(
            f"ranks ({layout}): the heaviest has {counts.rank_excess_mean:.1%} more places than "
            f"the mean rank, {counts.rank_excess_worst:.1%} in the worst update; others wait"
        )
    return [
        f"{'tokens' if number == 0 else '':<{LABEL}}{text}" for number, text in enumerate(texts)
    ]
