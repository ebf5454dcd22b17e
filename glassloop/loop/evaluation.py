"""Loss, greedy answers and scores of held-out rows, on all ranks.

Training is not changed by it. Rank r takes rows r, r + ranks, r + 2 ranks, ...; a rank may have
none. No collective stands between two passes or two answers, so ranks may take different times.
Results are gathered once, at the end, and every rank has the same.

Names in EvaluationRecord.scores and .base. A value is None if no row counts for it; counts are 0.
    loss_nats             token mean over all held-out rows (not only the answered ones)
    answers               rows that were answered
    ended                 share of answers that end with a stop token, not by max_new_tokens
    answer_tokens_mean    mean length of an answer, its stop token included
    answer_tokens_median  median of the same
    reasoning_rows        answered rows whose reference has a chain of thought
    closed_think          share of those whose answer closes </think>
    verdict_rows          answered rows with a label (scam or honest)
    no_verdict            share of those whose answer has no verdict
    accuracy              share of those whose verdict is the label; no verdict is wrong
    precision             scam rows among the answers that say scam
    recall                answers that say scam among the scam rows; no verdict does not
    f1                    2 TP / (2 TP + FP + FN), positive = scam

Legend: B rows, T tokens.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from glassloop.base.card_errors import first_line, lacks_memory
from glassloop.data.batches import build_pass
from glassloop.data.rows import Example, Row
from glassloop.data.scam import verdict_of
from glassloop.formula.dist import all_or_none, gather_objects
from glassloop.loop.generation import (
    EvaluationLacksMemory,
    EvaluationSetup,
    EvaluationStopped,
    generate,
    unchanged,
)
from glassloop.record.records import EvaluationRecord

VERDICTS = ("scam", "honest")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Answer:
    """One held-out row, answered greedily.

    Texts are decoded with every special token visible.
    """

    row_id: str
    prompt: str
    answer: str  # without the stop token
    reference: str  # the row's own last answer, chain of thought included
    label: str | None  # "scam" | "honest"; None if the row has no such label
    verdict: str | None  # of the answer; None if it has none, or the row has no label
    reasoning: bool  # the reference has a chain of thought
    closed_think: bool  # the answer has </think>
    ended: bool  # by a stop token
    tokens: int  # of the answer, stop token included
    base_answer: str | None = None  # without the adapter; None if the base was not asked


@dataclass(frozen=True)
class _Share:
    """One rank's results in the order of its rows.

    Losses are nats, summed over a row's supervised tokens.
    """

    losses: list[float]
    base_losses: list[float]
    answers: list[Answer]
    base_answers: list[Answer]


def evaluate(
    engine: nn.Module,
    rows: Sequence[Row],
    examples: Sequence[Example],
    setup: EvaluationSetup,
    *,
    generate_rows: int,
    with_base: bool,
    update: int,
    attempt: int = 1,
) -> tuple[EvaluationRecord, list[Answer]]:
    """Measure `rows` and answer the first `generate_rows` of `examples`.

    Every rank must call it and gets the same.

    Args:
        engine: forward(Pass) -> (loss_sum, row_loss_sums), with `.hf` the PEFT model. Not its DDP
            wrapper: that one's forward may wait for ranks that have another number of passes.
        with_base: do all of it a second time without the adapter.
        update: updates done before.

    Returns:
        The record, whose `seconds` are this rank's own wall time, and the answers in the order of
        `examples`.

    Raises:
        ValueError: no held-out row has a supervised token.
        RuntimeError: another rank failed. The failing rank raises its own error; none waits for it.
        EvaluationStopped, EvaluationLacksMemory: a stop was asked of a rank; its card had no room.
    """
    assert not isinstance(engine, DistributedDataParallel), (
        "evaluate() takes the engine itself, not its DDP wrapper"
    )
    started = time.perf_counter()
    tokens = sum(row.supervised_tokens for row in rows)
    if tokens == 0:
        raise ValueError(
            f"data.heldout: none of the {len(rows)} held-out rows has a supervised token, so there "
            "is no loss: choose other rows, raise data.max_tokens, or remove data.heldout"
        )
    hf: Any = engine.hf
    rank, ranks = setup.rank, setup.ranks
    my_rows, my_examples = rows[rank::ranks], examples[:generate_rows][rank::ranks]

    def my_share() -> _Share:
        losses = row_losses(engine, my_rows, setup)
        share = _Share(losses, [], answer_examples(hf, my_examples, setup), [])
        if not with_base:
            return share
        with hf.disable_adapter():
            losses = row_losses(engine, my_rows, setup)
            answers = answer_examples(hf, my_examples, setup)
        return replace(share, base_losses=losses, base_answers=answers)

    with all_or_none("evaluation") if ranks > 1 else nullcontext(), unchanged(engine, setup.device):
        share = unless_stopped(my_share)
    shares = of_all_ranks(share, ranks)
    assert len(shares) == ranks, f"setup.ranks = {ranks}, but {len(shares)} answered"
    loss_nats = math.fsum(loss for one in shares for loss in one.losses) / tokens
    all_answers = in_row_order([one.answers for one in shares])
    base = None
    if with_base:
        base_answers = in_row_order([one.base_answers for one in shares])
        base_nats = math.fsum(loss for one in shares for loss in one.base_losses) / tokens
        base = scores(base_answers, loss_nats=base_nats)
        all_answers = [
            replace(one, base_answer=other.answer)
            for one, other in zip(all_answers, base_answers, strict=True)
        ]
    record = EvaluationRecord(
        update=update,
        loss_nats=loss_nats,
        rows=len(rows),
        supervised_tokens=tokens,
        scores=scores(all_answers, loss_nats=loss_nats),
        base=base,
        seconds=time.perf_counter() - started,
        attempt=attempt,
    )
    return record, all_answers


def row_losses(engine: nn.Module, rows: Sequence[Row], setup: EvaluationSetup) -> list[float]:
    """Each row's loss in nats, summed over its supervised tokens.

    This rank only; there is no dropout.
    """
    sums = [torch.zeros(0, device=setup.device)]
    with unchanged(engine, setup.device), setup.autocast():
        for start in range(0, len(rows), setup.batch_size):
            if setup.stopped():
                raise EvaluationStopped
            batch = rows[start : start + setup.batch_size]
            p = build_pass(batch, packed=False, pad_id=setup.pad_id, device=setup.device)
            _, row_loss_sums = engine(p)
            sums.append(row_loss_sums)  # (B,) fp32; read by the host once, below
    return torch.cat(sums).tolist()


def answer_examples(hf: Any, examples: Sequence[Example], setup: EvaluationSetup) -> list[Answer]:
    """Answer the last turn of each example greedily, on this rank alone."""
    prompts = [list(setup.template.prompt_ids(example)) for example in examples]
    return [
        _answer(example, prompt, ids, setup)
        for example, prompt, ids in zip(
            examples, prompts, generate(hf, prompts, setup), strict=True
        )
    ]


def answer_together(hf: Any, examples: Sequence[Example], setup: EvaluationSetup) -> list[Answer]:
    """Share `answer_examples` among all ranks.

    Every rank must call it, and gets all answers in the order of `examples`.
    """
    with all_or_none("generation") if setup.ranks > 1 else nullcontext():
        mine = unless_stopped(
            lambda: answer_examples(hf, examples[setup.rank :: setup.ranks], setup)
        )
    return in_row_order(of_all_ranks(mine, setup.ranks))


@dataclass(frozen=True)
class _Lack:
    """What a card said that had no room."""

    said: str


def unless_stopped(action: Callable[[], Item]) -> Item | _Lack | None:
    """Run `action`; return None if a stop interrupts it.

    A lack of memory is returned too: all ranks react to one's.
    """
    try:
        return action()
    except EvaluationStopped:
        return None
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        return _Lack(first_line(error, type(error).__name__))


def of_all_ranks(mine: Item | _Lack | None, ranks: int) -> list[Item]:
    """Gather every rank's value.

    Raises:
        EvaluationStopped: on all ranks, if one has None.
        EvaluationLacksMemory: on all ranks, if a card had no room.
    """
    found: list[Any] = gather_objects(mine) if ranks > 1 else [mine]
    for rank, one in enumerate(found):
        if isinstance(one, _Lack):
            raise EvaluationLacksMemory(f"rank {rank} ran out of memory: {one.said}")
    values: list[Item] = [value for value in found if value is not None]
    if len(values) < len(found):
        raise EvaluationStopped
    return values


def scores(answers: Sequence[Answer], *, loss_nats: float) -> dict[str, float | None]:
    """Compute the scores that the head of this file names."""
    judged = [one for one in answers if one.label is not None]
    reasoned = [one for one in answers if one.reasoning]
    hits = sum(one.verdict == one.label == "scam" for one in judged)
    alarms = sum(one.verdict == "scam" for one in judged)
    scams = sum(one.label == "scam" for one in judged)
    lengths = [one.tokens for one in answers]
    return {
        "loss_nats": loss_nats,
        "answers": len(answers),
        "ended": _ratio(sum(one.ended for one in answers), len(answers)),
        "answer_tokens_mean": statistics.fmean(lengths) if lengths else None,
        "answer_tokens_median": float(statistics.median(lengths)) if lengths else None,
        "reasoning_rows": len(reasoned),
        "closed_think": _ratio(sum(one.closed_think for one in reasoned), len(reasoned)),
        "verdict_rows": len(judged),
        "no_verdict": _ratio(sum(one.verdict is None for one in judged), len(judged)),
        "accuracy": _ratio(sum(one.verdict == one.label for one in judged), len(judged)),
        "precision": _ratio(hits, alarms),
        "recall": _ratio(hits, scams),
        "f1": _ratio(2 * hits, alarms + scams),  # alarms + scams = 2 TP + FP + FN
    }


def _answer(
    example: Example,
    prompt: Sequence[int],
    ids: Sequence[int],
    setup: EvaluationSetup,
) -> Answer:
    ended = bool(ids) and ids[-1] in setup.stop_ids
    text = _decode(setup, ids[:-1] if ended else ids)
    turn = next((turn for turn in reversed(example.turns) if turn.role == "assistant"), None)
    reasoning = turn.reasoning if turn is not None else None
    content = turn.content if turn is not None else ""
    label = example.label if example.label in VERDICTS else None
    return Answer(
        row_id=example.row_id,
        prompt=_decode(setup, prompt),
        answer=text,
        reference=content if reasoning is None else f"<think>\n{reasoning}\n</think>\n\n{content}",
        label=label,
        verdict=verdict_of(text) if label is not None else None,
        reasoning=reasoning is not None,
        closed_think="</think>" in text,
        ended=ended,
        tokens=len(ids),
    )


def _decode(setup: EvaluationSetup, ids: Sequence[int]) -> str:
    shown: dict[str, bool] = {
        "skip_special_tokens": False,
        "clean_up_tokenization_spaces": False,
    }
    return str(setup.tokenizer.decode(list(ids), **shown))


def in_row_order(parts: Sequence[Sequence[Item]]) -> list[Item]:
    """Merge the ranks' lists into the order of rows."""
    total, ranks = sum(len(part) for part in parts), len(parts)
    return [parts[index % ranks][index // ranks] for index in range(total)]


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
