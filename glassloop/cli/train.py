"""Train on a file or data set: model and source suffice."""

from __future__ import annotations

import gc
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glassloop.config import Config
    from glassloop.predict.cpu import CpuSpeed

USAGE = "glassloop train FILE_OR_DATASET --model ID [section.field=VALUE ...]"
EXPLAINED = f"""\
usage: {USAGE}

Fine-tunes a 4-bit model with LoRA on your rows, on all visible GPUs, or on the
CPU without one. It guesses what you do not say, prints its guesses with the
setting that changes each, counts tokens, predicts memory and time, and starts.

  FILE_OR_DATASET  csv, json, jsonl, parquet, a folder or a hub id
  --model ID       hub id or folder of the model; smollm2 is small, for a CPU
  --gpus N         GPUs to use; 0: the CPU (default: all that are visible)
  --epochs E       passes over your rows (default: 1)
  --preset NAME    a recipe in place of FILE and --model:
                   {{presets}}
  --hardware NAME  settings for other cards than those here, such as 2x3090
  --resume RUN     resume a run from its last checkpoint
  --dry-run        stop before the ranks start
  section.field=V  any other setting; glassloop train --help lists them

Examples:
  glassloop train qa.csv --model Qwen/Qwen2.5-1.5B-Instruct
  glassloop train qa.csv --model smollm2 --epochs 3 optimizer.lr=5e-4
  glassloop train --preset r1_8b_scam --dry-run"""
FIELDS = {"--model": "model.id", "--epochs": "schedule.epochs"}
FIELD = re.compile(r"[a-z_]+(\.[a-z_0-9]+)+|seed")
VALUES = ("--model", "--epochs", "--gpus", "--preset", "--resume")  # options with one value


@dataclass
class Asked:
    """The words of a command line, apart."""

    sources: list[str] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)  # for train_loop.py
    dry_run: bool = False


@contextmanager
def no_searches() -> Iterator[None]:
    """Search for no garbage meanwhile.

    Imports and rows make none, and to search them takes a second.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@no_searches()
def main(argv: list[str]) -> int:
    """Plan and start a run.

    Returns the run's exit code, 130 after Ctrl-C. Raises ValueError for bad input.
    """
    from glassloop.config.arguments import parse
    from glassloop.config.options import refuse_misspelt
    from glassloop.config.presets import PRESETS
    from glassloop.predict.hardware import card_here

    if not argv or {"-h", "--help"} & set(argv):
        presets = textwrap.wrap(", ".join(PRESETS), 60)
        print(EXPLAINED.replace("{presets}", f"\n{' ' * 19}".join(presets)))
        if argv:
            print("\nAll settings:\n")
            parse(["--help"], prog="glassloop train")
        return 2
    from glassloop.loop.launch import hush

    hush(1)  # no progress bars between the lines of this command
    asked = split(argv)
    refuse_misspelt(asked.words, (*VALUES, "--dry-run"), "glassloop train")
    if "--resume" in asked.options:
        return _resume(asked)
    words = run_words(asked)
    on_cpu, visible = devices(asked.options.get("--gpus"))
    if not any(word.partition("=")[0] == "--hardware" for word in words):
        words += ["--hardware", "cpu" if on_cpu else card_here()]
    config = parse(words, prog="glassloop train")
    ranks = ranks_for(config, asked.options.get("--gpus"), visible, on_cpu=on_cpu)
    for line in outline(config, ranks, on_cpu=on_cpu):
        print(line)
    print(f"start     {accelerate_line(ranks, words, on_cpu=on_cpu)}", flush=True)
    if asked.dry_run:
        return 0
    return _start(ranks, words, on_cpu=on_cpu)


def split(argv: Sequence[str]) -> Asked:
    """Tell the file, this command's options and the run's settings apart."""
    asked, waiting = Asked(), list(argv)
    while waiting:
        word = waiting.pop(0)
        name, equals, value = word.partition("=")
        if name in VALUES:
            if not equals and not waiting:
                raise ValueError(f"{name} needs a value: {USAGE}")
            asked.options[name] = value if equals else waiting.pop(0)
        elif word in ("--dry-run", "--dry_run"):
            asked.dry_run = True
        elif word.startswith("--"):
            asked.words.append(word)
            if not equals and waiting and not waiting[0].startswith("--") and "=" not in waiting[0]:
                asked.words.append(waiting.pop(0))  # --section.field VALUE
        elif equals and FIELD.fullmatch(name):
            asked.words.append(word)
        else:
            asked.sources.append(word)
    return asked


def run_words(asked: Asked) -> list[str]:
    """Words for train_loop.py.

    Raises ValueError if nothing says what to train, or on what.
    """
    from glassloop.config.presets import PRESETS

    sources, preset = asked.sources, asked.options.get("--preset")
    if len(sources) == 1 and sources[0] in PRESETS and not Path(sources[0]).exists():
        preset, sources = sources[0], []
    if len(sources) > 1:
        raise ValueError(
            f"{len(sources)} files are given ({', '.join(sources[:3])}), one is expected. Quote a "
            f"pattern so that the shell leaves it whole: '{_pattern(sources)}'"
        )
    words = [] if preset is None else [preset]
    words += [f"data.source={source}" for source in sources]
    words += [f"{FIELDS[name]}={asked.options[name]}" for name in FIELDS if name in asked.options]
    words += asked.words
    given = {word.lstrip("-").partition("=")[0] for word in words}
    if preset is None and not given & {"data.source", "data.mix", "config"}:
        raise ValueError(f"nothing says what to train on: name a file or a data set. {USAGE}")
    if preset is None and not given & {"model.id", "config"}:
        raise ValueError(
            "nothing says which model to train: add --model ID, for example --model "
            "Qwen/Qwen2.5-1.5B-Instruct, or --model smollm2 to try it on a CPU"
        )
    return words


def _pattern(sources: Sequence[str]) -> str:
    """A pattern that names these files again."""
    folder, suffix = Path(sources[0]).parent, Path(sources[0]).suffix
    return str(folder / f"*{suffix}")


def devices(gpus: str | None) -> tuple[bool, int]:
    """Whether to train on the CPU, and the visible GPUs.

    Raises ValueError if the words contradict the machine.
    """
    import torch

    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus is not None and not gpus.isdigit():
        raise ValueError(f"--gpus {gpus}: give a number of GPUs, or 0 for the CPU")
    if gpus is not None and int(gpus) > visible:
        raise ValueError(
            f"--gpus {gpus}, but {visible} {'is' if visible == 1 else 'are'} visible here"
            + ("; leave it out to train on the CPU" if not visible else "")
        )
    return visible == 0 or gpus == "0", visible


def ranks_for(config: Config, gpus: str | None, visible: int, *, on_cpu: bool) -> int:
    """Number of ranks to start.

    As asked, else one for each GPU, else two on a CPU with two cores.
    """
    import os

    asked = config.batch.ranks
    if not on_cpu:
        ranks = int(gpus) if gpus else asked or visible
        if ranks > visible:
            raise ValueError(f"batch.ranks = {ranks}, but {visible} GPUs are visible here")
        if asked not in (None, ranks):
            raise ValueError(f"--gpus {gpus} and batch.ranks = {asked} differ: keep one")
        return ranks
    return asked or (2 if len(os.sched_getaffinity(0)) > 1 else 1)


def accelerate_line(ranks: int, words: Sequence[str], *, on_cpu: bool) -> str:
    """The same start by hand."""
    from glassloop.loop.ranks import script

    if Path("accelerate_configs").is_dir() and Path("train_loop.py").is_file():
        name = "cpu_2proc" if on_cpu else "single_gpu" if ranks == 1 else "ddp_2gpu"
        count = "" if ranks == {"cpu_2proc": 2, "single_gpu": 1, "ddp_2gpu": 2}[name] else ranks
        options = f"--config_file accelerate_configs/{name}.yaml"
        options += f" --num_processes {count}" if count else ""
        return f"accelerate launch {options} train_loop.py {shlex.join(words)}"
    options = f"--num_processes {ranks} --num_machines 1 --mixed_precision no"
    options += " --main_process_port 0 --dynamo_backend no"
    if ranks > 1:
        options = "--multi_gpu " + options
    if on_cpu:
        options += f" --gpu_ids={','.join(['-1'] * max(2, ranks))}"
    return f"accelerate launch {options} {script()} {shlex.join(words)}"


def outline(config: Config, ranks: int, *, on_cpu: bool) -> list[str]:
    """Guesses with the settings that change them, tokens, memory and time."""
    from glassloop.cli.plan import measure
    from glassloop.data.stored import lengths_of
    from glassloop.plan.outlook import look_ahead
    from glassloop.plan.overview import RowFacts, overview_lines
    from glassloop.predict.hardware import gpus_present

    present = () if on_cpu else gpus_present()
    seen = measure(config, ranks, present)
    outlook = look_ahead(
        config, seen.plan, rows_from=seen.rows_from, counts=seen.counts, present=present
    )
    loaded, train, template = seen.dataset.loaded, seen.dataset.train, seen.dataset.template
    lengths = sorted(lengths_of(train.rows))
    too_long = f"longer than {config.data.max_tokens:,} tokens"
    rows = RowFacts(
        source=loaded.source,
        format=loaded.format,
        template=f"{template.name} ({template.why})" if template.why else template.name,
        rows=len(train.rows),
        left_out={
            **loaded.skipped,
            **train.faulty,
            **({too_long: len(train.dropped)} if train.dropped else {}),
        },
        median_tokens=lengths[len(lengths) // 2],
        longest_tokens=lengths[-1],
        cut=train.cut,
        supervised_share=train.supervised_tokens / train.tokens,
        heldout=len(seen.dataset.heldout.rows),
        notes=(*loaded.notes, *seen.by_source),
        longest_read_tokens=train.untouched_tokens[-1],
    )
    return overview_lines(outlook, rows, cpu=cpu_speed(ranks) if on_cpu else None)


def cpu_speed(ranks: int) -> CpuSpeed:
    """Rates that a rank's threads reach now: a median of tries."""
    import os

    import bitsandbytes
    import torch
    from bitsandbytes.functional import quantize_4bit

    from glassloop.predict.cpu import CpuSpeed

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    try:
        a, token = torch.randn(768, 768), torch.randn(1, 1024)
        weights, state = quantize_4bit(torch.randn(1024, 1024), quant_type="nf4")
        product_s = _median_s(lambda: torch.mm(a, a))
        linear_s = _median_s(
            lambda: bitsandbytes.matmul_4bit(token, weights, quant_state=state)  # type: ignore[attr-defined]
        )
    finally:
        torch.set_num_threads(before)
    return CpuSpeed(ranks * 2 * 768**3 / product_s, linear_s / 1024**2)


def _median_s(action: Callable[[], object]) -> float:
    """Seconds of an action, without its first time."""
    import time

    action()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return sorted(times)[2]


def _resume(asked: Asked) -> int:
    """Start the ranks of a recorded run again."""
    import json

    from glassloop.config.arguments import parse

    if asked.sources or "--preset" in asked.options:
        raise ValueError("--resume takes rows, model and preset from the run: leave them out")
    words = ["--resume", asked.options["--resume"]]
    words += [f"{FIELDS[name]}={asked.options[name]}" for name in FIELDS if name in asked.options]
    words += asked.words
    config = parse(words, prog="glassloop train")
    on_cpu, visible = devices(asked.options.get("--gpus"))
    ranks = int(asked.options.get("--gpus") or 0)
    if not ranks:
        plan = Path(str(config.resume.run)) / "plan.json"
        try:
            ranks = int(json.loads(plan.read_text(encoding="utf-8"))["ranks"])
        except (OSError, ValueError, KeyError, TypeError):
            ranks = ranks_for(config, None, visible, on_cpu=on_cpu)
    if not on_cpu and ranks > visible:
        raise ValueError(
            f"{config.resume.run} has {ranks} ranks, but {visible} GPUs are visible here. Resume "
            f"with fewer: --gpus {visible} --resume.reshape=true"
        )
    print(f"start     {accelerate_line(ranks, words, on_cpu=on_cpu)}", flush=True)
    return 0 if asked.dry_run else _start(ranks, words, on_cpu=on_cpu)


def _start(ranks: int, words: Sequence[str], *, on_cpu: bool) -> int:
    from glassloop.loop.ranks import start_ranks

    sys.stdout.flush()
    return start_ranks(ranks, words, on_cpu=on_cpu)
