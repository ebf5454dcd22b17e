"""Merge the adapter into 16-bit weights, and show what that costs."""

from __future__ import annotations

import argparse
import math
import resource
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glassloop.cli.evaluate import columns_of
from glassloop.cli.generate import add_run_options, overrides_of
from glassloop.config.options import Options

if TYPE_CHECKING:
    from glassloop.use.merge.table import Line

GIB = 2**30
GGUF_TYPES = ("q8_0", "bf16", "f16", "f32")  # that the converter writes without another tool


def main(argv: list[str]) -> int:
    """`glassloop merge RUN OUT --base original|dequantised`.

    Exit code 0; 2 for refused input.
    """
    given = _parser().parse_args(argv)
    if given.gguf is not None and given.bits == 4:
        raise ValueError(
            "--gguf converts 16-bit weights: leave --bits 4 out, and let TYPE say the rounding"
        )
    if given.converter is not None and given.gguf is None:
        raise ValueError("--converter is for --gguf TYPE: name the type, such as --gguf q8_0")
    if given.bits == 4 and not given.accept_rounding:
        raise ValueError(
            "--bits 4: rounding merged weights to 4 bits changes most of them by more than a light "
            "fine-tune does, and can undo it. Serve the adapter beside the 4-bit base, or merge "
            "into 16 bits; to do it all the same and see the cost in the table: --accept-rounding"
        )
    for name in ("rows", "shard_gib"):
        if not 0 < getattr(given, name) < math.inf:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(given, name)}: it must be a number above 0"
            )
    columns_of(given.columns)  # refused before anything is opened
    return run(given)


def _parser() -> argparse.ArgumentParser:
    own = Options(
        prog="glassloop merge",
        allow_abbrev=False,
        description="W + (alpha/r) B A in fp32, rounded once to 16 bits, shard by shard; no GPU "
        "needed. original: into the base's own weights. dequantised: into the NF4 weights of "
        "training.",
        epilog="OUT loads in transformers and vLLM. SERVE.txt in it has the commands, Modelfile is "
        "for Ollama, glassloop_merge.json has the table.",
    )
    add_run_options(own)
    own.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    own.add_argument(
        "--base",
        choices=("original", "dequantised"),
        default="original",
        help="what to merge into (default: original)",
    )
    own.add_argument(
        "--shard-gib",
        type=float,
        default=4.0,
        metavar="GIB",
        help="largest file, and about what is held in memory",
    )
    own.add_argument(
        "--data", metavar="SOURCE", help="rows for the table instead of the run's held-out ones"
    )
    own.add_argument(
        "--columns",
        metavar="ROLE=NAME,...",
        help="columns of --data where they differ: dialogue=text,label=is_scam",
    )
    own.add_argument(
        "--rows",
        type=int,
        default=32,
        metavar="N",
        help="at most N rows for the table (default: 32)",
    )
    own.add_argument("--no-table", action="store_true", help="merge alone; compare nothing")
    own.add_argument(
        "--bits",
        type=int,
        choices=(16, 4),
        default=16,
        help="4 rounds the merged weights to NF4 once more",
    )
    own.add_argument(
        "--accept-rounding",
        action="store_true",
        help="say so for --bits 4, which is refused without",
    )
    own.add_argument(
        "--gguf",
        choices=GGUF_TYPES,
        help="write OUT/model-TYPE.gguf too, by llama.cpp's converter",
    )
    own.add_argument(
        "--converter",
        type=Path,
        metavar="FILE",
        help="llama.cpp's convert_hf_to_gguf.py (default: in the folder $GLASSLOOP_LLAMA_CPP)",
    )
    return own


def unwritable(out: Path, error: OSError) -> ValueError:
    return ValueError(f"OUT = {out} cannot be written ({error.strerror}): name another place")


def run(given: argparse.Namespace) -> int:
    from glassloop.disk.cache import published
    from glassloop.loop.launch import hush
    from glassloop.use.merge.folder import check_out
    from glassloop.use.merge.gguf import find_converter
    from glassloop.use.merge.job import Job
    from glassloop.use.merge.table import text
    from glassloop.use.trained import load_tokenizer_of, open_trained, template_of

    check_out(given.out)
    converter = None if given.gguf is None else find_converter(given.converter)
    hush(1)
    trained = open_trained(given.run, given.at, overrides_of(given))
    scale = f"{trained.config.lora.scale_in_words} = {trained.scale:g}"
    print(f"adapter   {trained.checkpoint}, {trained.why}; scale {scale}")
    tokenizer = load_tokenizer_of(trained)
    template = template_of(trained, tokenizer)
    job = Job(given, trained, tokenizer, template, columns_of(given.columns))

    lines: list[Line] = []
    beside = given.out.absolute().parent
    with tempfile.TemporaryDirectory(prefix=".merge-", dir=beside) as spare:
        with published(given.out, lambda _, error: unwritable(given.out, error)) as folder:
            job.write(folder, given.base)
            if given.bits == 4:
                lines = [] if given.no_table else job.table(folder, Path(spare))
                job.to_4_bits(folder)
                if not given.no_table:
                    lines.append(job.line("that, rounded to NF4 once more", job.seen(folder)))
            job.finish(folder, lines)
        print(f"wrote     {given.out}", flush=True)
        # After OUT is there, so that a failed comparison loses no merge.
        if given.bits == 16 and not given.no_table:
            lines = job.table_of_written(Path(spare))
    for line in text(lines, "the adapter on " + job.trained_on):
        print(line)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        GIB if sys.platform == "darwin" else 2**20
    )
    print(f"peak      {job.peak_gib:.1f} GiB of host memory while merging, {peak:.1f} GiB in all")
    if converter is not None:
        as_gguf(given, converter, tokenizer)
    job.say_how_to_serve()
    return 0


def as_gguf(given: argparse.Namespace, converter: Path, tokenizer: Any) -> None:
    """Convert the merged weights, and compare greedy tokens.

    The Modelfile then names the file.
    """
    from glassloop.use.merge.gguf import compared, convert, point_modelfile_at

    file = convert(given.out.absolute(), given.gguf, converter)
    pointed = "; Modelfile names it" if point_modelfile_at(file) else ""
    print(f"gguf      {given.out / file.name}, {file.stat().st_size / GIB:.2f} GiB{pointed}")
    found = compared(file, tokenizer)
    print(f"          {found or 'not compared: pip install xllamacpp'}", flush=True)
