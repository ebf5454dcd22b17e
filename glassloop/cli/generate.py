"""Answer questions with base and adapter: streamed, batched, or in chat."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from glassloop.config.options import Options

SIDES = {"both": ("base", "adapter"), "base": ("base",), "adapter": ("adapter",)}


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of all commands that open a trained adapter."""
    parser.add_argument(
        "run", metavar="RUN", type=Path, help="folder of a run, or of one of its checkpoints"
    )
    parser.add_argument(
        "--at",
        type=int,
        metavar="N",
        help="the checkpoint after N updates (default: the best by held-out loss)",
    )
    parser.add_argument("--model", metavar="MODEL", help="where the base model is now (model.id)")
    parser.add_argument(
        "--trust-remote-code",
        action=argparse.BooleanOptionalAction,
        help="run Python code that comes with the model; a run's config cannot ask for it",
    )
    parser.add_argument(
        "--cache-dir", metavar="DIR", help="folder for quantised bases (model.cache_dir)"
    )


def overrides_of(given: argparse.Namespace) -> dict[str, str]:
    """Fields of the recorded config that the command line replaces."""
    asked = {
        "model.id": given.model,
        "model.trust_remote_code": given.trust_remote_code,
        "model.cache_dir": given.cache_dir,
    }
    return {field: str(value) for field, value in asked.items() if value is not None}


def main(argv: list[str]) -> int:
    """`glassloop generate RUN ["question" ...] [--file FILE] [--chat]`.

    Exit code 0; 2 for what is refused.
    """
    # Options may stand before the question, between and after.
    given = _parser().parse_intermixed_args(argv)
    for name in ("batch", "max_new_tokens"):
        if getattr(given, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(given, name)}: it must be 1 or more"
            )
    return run(given)


def _parser() -> argparse.ArgumentParser:
    own = Options(
        prog="glassloop generate",
        allow_abbrev=False,
        description="Answers by the base and by the adapter. Sampling follows the model's "
        "generation_config.json, unless given.",
    )
    add_run_options(own)
    own.add_argument(
        "question",
        nargs="*",
        help="one question each; - reads stdin, and so does no question at all",
    )
    own.add_argument(
        "--file",
        type=Path,
        help="questions, one a line (.jsonl: strings, or objects with question, prompt or "
        "dialogue)",
    )
    own.add_argument(
        "--chat",
        action="store_true",
        help="talk in turns; /reset begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer",
    )
    own.add_argument(
        "--call",
        action="store_true",
        help="the text is a phone call: ask about it what format scam asks",
    )
    own.add_argument("--only", choices=SIDES, default="both", help="whose answers (default: both)")
    own.add_argument(
        "--system",
        metavar="TEXT",
        help="system prompt (default: the run's data.system; '' for none)",
    )
    own.add_argument("--greedy", action="store_true", help="the most likely token at each place")
    own.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="logits are divided by T before a token is drawn; 0: as --greedy",
    )
    own.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="draw from the fewest most likely tokens that have P together",
    )
    own.add_argument("--top-k", type=int, metavar="K", help="draw from the K most likely tokens")
    own.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="question i draws from seed and i (default: 0)",
    )
    own.add_argument(
        "--max-new-tokens",
        type=int,
        default=1024,
        metavar="N",
        help="longest answer, reasoning included (default: 1024)",
    )
    own.add_argument(
        "--batch", type=int, default=8, metavar="N", help="questions answered together (default: 8)"
    )
    own.add_argument(
        "--precision", choices=("bf16", "fp16", "fp32"), help="instead of the run's own"
    )
    own.add_argument("--json", action="store_true", help="one JSON object a question")
    return own


def run(given: argparse.Namespace) -> int:
    from glassloop.use.questions import questions_of

    if given.chat and (given.question or given.file or given.json):
        raise ValueError(
            "--chat reads questions as you type them: leave the question, --file and --json out"
        )
    questions: list[str] = []
    if not given.chat:
        wants_stdin = "-" in given.question or not (given.question or given.file)
        stdin = sys.stdin.buffer.read() if wants_stdin and not sys.stdin.isatty() else None
        questions = questions_of(given.question, given.file, stdin)

    from glassloop.loop.launch import hush
    from glassloop.use.loaded import device_here, load
    from glassloop.use.trained import load_tokenizer_of, open_trained, template_of

    hush(1)
    trained = open_trained(given.run, given.at, overrides_of(given))
    tokenizer = load_tokenizer_of(trained)
    template = template_of(trained, tokenizer)
    loaded = load(trained, device_here(), precision=given.precision)
    from glassloop.use.session import Session

    return Session(given, trained, tokenizer, template, loaded).run(questions)
