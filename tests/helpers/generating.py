"""Questions to a trained run, by function and by command."""

from __future__ import annotations

import io

from trained_runs import prompt_of

from glassloop.cli.__main__ import main
from glassloop.use.answering import (
    Sampling,
    answer,
)
from glassloop.use.loaded import setup_of


def asked(
    parts, questions, *, seed=7, sampling=None, batch=8, with_adapter=True, write=None, first=0
):
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
    )


def command(capsys, *words, stdin: bytes | None = None, monkeypatch=None):
    if stdin is not None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    code = main(["generate", *map(str, words)])
    out = capsys.readouterr()
    return code, out.out, out.err
