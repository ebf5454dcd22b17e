"""Questions to a trained run, by function and by command."""

from __future__ import annotations

import io
import json

from schemas import conform
from trained_runs import prompt_of

from glassloop.cli.__main__ import main
from glassloop.use.answering import answer
from glassloop.use.loaded import setup_of
from glassloop.use.sampling import Sampling


def asked(parts, questions, **options):
    """Replies to questions."""
    return asked_at_cost(parts, questions, **options)[0]


def asked_at_cost(
    parts,
    questions,
    *,
    seed=7,
    sampling=None,
    batch=8,
    with_adapter=True,
    write=None,
    first=0,
    cut=lambda: False,
):
    """Replies to questions, and their cost."""
    loaded, tokenizer, template = parts
    return answer(
        loaded,
        [prompt_of(template, q) for q in questions],
        setup_of(loaded, template, tokenizer, batch_size=batch, max_new_tokens=12),
        with_adapter=with_adapter,
        sampling=sampling or Sampling(temperature=0.9, top_p=0.95),
        seed=seed,
        number=first,
        write=write,
        cut=cut,
    )


def command(capsys, *words, stdin: bytes | None = None, monkeypatch=None):
    if stdin is not None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    code = main(["generate", *map(str, words)])
    out = capsys.readouterr()
    return code, out.out, out.err


def told_of(capsys, *words):
    """Answers that a command tells in JSON."""
    return answers_in(command(capsys, *words)[1])


def answers_in(out):
    """Lines of --json without the cost of their answers."""
    return [answers_of(conform("generate", json.loads(line))) for line in out.splitlines()]


def answers_of(line):
    """A line of --json without the cost of its answers."""
    return {
        name: {k: v for k, v in one.items() if k != "cost"} if isinstance(one, dict) else one
        for name, one in line.items()
    }
