"""Held-out evaluation on one process: what it reports is right, and training does not notice. Two
ranks: ../dist."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from evaluation_toys import (
    POSITIONS,
    STOP,
    NeverStops,
    ToyEngine,
    ToyTemplate,
    run_evaluation,
    toy_examples,
    toy_rows,
    without_seconds,
)
from toy_answers import generated, prompts_of
from transformers import GenerationConfig

from glassloop.data.rows import Example, Row, Turn
from glassloop.data.scam import verdict_of
from glassloop.loop import evaluation
from glassloop.loop.evaluation import Answer, scores


def likeliest_without_cache(engine: ToyEngine, prompt: list[int], length: int) -> tuple[int, ...]:
    """One prompt alone, unpadded, and a whole pass for each new token."""
    ids = list(prompt)
    model = engine.hf.get_base_model().eval()
    with torch.no_grad():
        while len(ids) < len(prompt) + length and ids[len(prompt) :][-1:] != [STOP]:
            ids.append(
                int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            )
    engine.train()
    return tuple(ids[len(prompt) :])


# --- what is reported ---


@pytest.mark.parametrize("count", range(1, 10))
def test_loss_is_the_mean_over_tokens_whatever_the_batch_size(count: int) -> None:
    engine, rows = ToyEngine(), toy_rows(count)
    total = torch.zeros((), dtype=torch.float64)
    model = engine.hf.get_base_model().eval()
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0].double()  # (T, V)
            losses = F.cross_entropy(logits[:-1], torch.tensor(row.input_ids[1:]), reduction="none")
            total += losses[torch.tensor(row.supervised[1:])].sum()
    engine.train()
    tokens = sum(row.supervised_tokens for row in rows)
    for batch_size in (1, 2, 4):
        record, _ = run_evaluation(
            engine, rows, batch_size=batch_size, generate_rows=0, with_base=False
        )
        assert record.loss_nats == pytest.approx(total.item() / tokens, rel=1e-5)
        assert (record.rows, record.supervised_tokens, record.update) == (count, tokens, 3)


def test_base_is_the_same_model_without_its_adapter() -> None:
    engine, rows = ToyEngine(), toy_rows(5)
    record, answers = run_evaluation(engine, rows)
    repeat, _ = run_evaluation(engine, rows)
    for name, p in engine.hf.named_parameters():
        if "lora_B" in name:
            p.data.zero_()
    bare, bare_answers = run_evaluation(engine, rows, with_base=False)
    assert record.base is not None
    assert bare.base is None
    assert without_seconds(record) == without_seconds(repeat), (
        "the adapter is back after the base was asked"
    )
    assert (
        record.base["loss_nats"]
        == pytest.approx(bare.loss_nats, rel=1e-6)
        != pytest.approx(record.loss_nats, rel=1e-3)
    )
    assert [one.base_answer for one in answers] == [one.answer for one in bare_answers]
    assert [one.base_answer for one in answers] != [one.answer for one in answers]
    assert {**record.base, "loss_nats": 0} == {**bare.scores, "loss_nats": 0}
    assert all(one.base_answer is None for one in bare_answers)


def test_answers_carry_their_row_their_texts_and_how_they_ended() -> None:
    record, answers = run_evaluation(ToyEngine(), toy_rows(9), generate_rows=7)
    assert [one.row_id for one in answers] == [f"toy:{index}" for index in range(7)]
    assert (record.rows, record.scores["answers"]) == (9, 7)
    assert answers[0].reference == "answer 0"
    assert answers[1].reference == "<think>\nbecause\n</think>\n\nanswer 1"
    assert answers[0].prompt == " ".join(
        f"t{token}" for token in ToyTemplate().prompt_ids(toy_examples(1)[0])
    )
    assert [one.label for one in answers] == [None, "honest", None, "scam", None, None, "scam"]
    assert [one.verdict for one in answers] == [
        None if one.label is None else verdict_of(one.answer) for one in answers
    ]
    assert {one.ended for one in answers} == {True, False}, "the toy must show both"
    for one in answers:
        assert f"t{STOP}" not in one.answer.split()
        assert one.tokens == len(one.answer.split()) + one.ended
        assert one.ended or one.tokens == 8
        assert one.closed_think == ("</think>" in one.answer)
    assert any(one.closed_think for one in answers)


def answer(label: str | None = None, verdict: str | None = None, **changes: Any) -> Answer:
    return dataclasses.replace(
        Answer("a", "", "", "", label, verdict, False, False, False, 1), **changes
    )


def test_scores_by_hand() -> None:
    answers = [
        *[answer("scam", "scam")] * 3,  # TP
        answer("scam", "honest"),  # FN
        answer("scam", None),  # FN, and wrong
        answer("honest", "scam"),  # FP
        answer("honest", "honest"),  # TN
        answer("honest", None),  # wrong, but no alarm
        answer(reasoning=True, closed_think=True, ended=True, tokens=4),
        answer(reasoning=True, closed_think=False, ended=False, tokens=9),
        answer(
            reasoning=False, closed_think=True, ended=True, tokens=2
        ),  # not a reasoning row: not in closed_think
    ]
    assert scores(answers, loss_nats=1.5) == {
        "loss_nats": 1.5,
        "answers": 11,
        "ended": 2 / 11,
        "answer_tokens_mean": 23 / 11,
        "answer_tokens_median": 1.0,
        "reasoning_rows": 2,
        "closed_think": 0.5,
        "verdict_rows": 8,
        "no_verdict": 2 / 8,
        "accuracy": 4 / 8,
        "precision": 3 / 4,
        "recall": 3 / 5,
        "f1": 6 / 9,
    }


def test_a_score_without_rows_is_none_and_every_name_is_documented() -> None:
    nothing = scores([], loss_nats=2.0)
    counts = {"answers", "reasoning_rows", "verdict_rows"}
    assert {name: value for name, value in nothing.items() if value is not None} == {
        "loss_nats": 2.0
    } | dict.fromkeys(counts, 0)
    all_honest = scores([answer("honest", "honest")] * 2, loss_nats=2.0)
    assert (
        all_honest["accuracy"],
        all_honest["precision"],
        all_honest["recall"],
        all_honest["f1"],
    ) == (1.0, None, None, None)
    silent = scores([answer("scam", None), answer("honest", None)], loss_nats=2.0)
    assert (silent["accuracy"], silent["precision"], silent["recall"], silent["f1"]) == (
        0.0,
        None,
        0.0,
        0.0,
    )
    documented = re.findall(r"^    (\w+) {2,}\S", evaluation.__doc__ or "", flags=re.MULTILINE)
    assert documented == list(nothing)


def test_other_labels_are_no_verdicts() -> None:
    examples = (
        Example("x", (Turn("user", "q"), Turn("assistant", "a")), label="poem"),
        Example("y", (Turn("user", "q"),)),
    )
    record, answers = run_evaluation(ToyEngine(), toy_rows(2), examples=examples)
    assert record.scores["verdict_rows"] == 0
    assert answers[0].label is None
    assert answers[1].reference == ""


def test_no_answers_asked_generates_none(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ToyEngine()
    monkeypatch.setattr(type(engine.hf.get_base_model()), "generate", None)
    record, answers = run_evaluation(engine, toy_rows(3), generate_rows=0)
    assert answers == []
    assert record.scores["accuracy"] is None
    assert record.base is not None


@pytest.mark.parametrize("rows", [(), (Row("x", (2, 3, 4), (False, False, False)),)])
def test_held_out_rows_without_a_supervised_token_are_refused(rows: tuple[Row, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"data\.heldout: none of the \d held-out rows has a supervised token"
    ):
        run_evaluation(ToyEngine(), rows)


# --- generation ---


@pytest.mark.parametrize("checkpointing", [False, True])
def test_answers_are_the_likeliest_tokens_in_padded_batches_with_a_cache(
    checkpointing: bool,
) -> None:
    """A model in training mode, under activation checkpointing, with use_cache off in its config,
    as the trainer has it."""
    engine, prompts = ToyEngine(checkpointing=checkpointing), prompts_of(9)
    seen: list[int] = []
    engine.hf.get_base_model().model.layers[0].register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape[1])
    )
    answers = generated(engine, prompts, batch_size=len(prompts), stop_ids=(STOP,))
    assert (seen[0], set(seen[1:])) == (max(map(len, prompts)), {1}), (
        "after the prompt, one new token a pass"
    )
    assert len({len(prompt) for prompt in prompts}) > 3
    assert answers == [likeliest_without_cache(engine, prompt, 10) for prompt in prompts]
    assert answers == generated(engine, prompts, batch_size=2)


def test_an_answer_stops_at_any_stop_token_and_keeps_it() -> None:
    engine, prompts = ToyEngine(), prompts_of(6)
    free = generated(engine, prompts, stop_ids=())
    assert [len(ids) for ids in free] == [10] * 6
    stops = (free[0][3], free[2][4])
    expected = [
        ids[: next((i + 1 for i, token in enumerate(ids) if token in stops), 10)] for ids in free
    ]
    assert len({len(ids) for ids in expected}) > 2
    assert generated(engine, prompts, stop_ids=stops) == expected
    passes: list[None] = []
    engine.hf.get_base_model().register_forward_hook(lambda *_: passes.append(None))
    assert generated(engine, prompts, stop_ids=stops, batch_size=1) == expected
    assert len(passes) == sum(map(len, expected)), "nothing is computed behind a stop token"
    assert generated(engine, prompts, stop_ids=stops, pad_id=stops[0]) == expected, (
        "a pad token that is a stop token"
    )


def test_a_pad_token_in_an_answer_is_part_of_it() -> None:
    engine, prompts = ToyEngine(), prompts_of(6)
    free = generated(engine, prompts, stop_ids=())
    assert generated(engine, prompts, stop_ids=(), pad_id=free[0][2]) == free


def test_the_models_own_generation_settings_are_laid_aside_and_put_back() -> None:
    engine, prompts = ToyEngine(), prompts_of(6)
    plain = generated(engine, prompts, stop_ids=())
    model = engine.hf.get_base_model()
    settings = GenerationConfig(
        do_sample=True,
        temperature=5.0,
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        eos_token_id=list(range(9)),
        max_length=2,
    )
    model.generation_config = settings
    before = settings.to_dict()
    assert generated(engine, prompts, stop_ids=()) == plain
    assert model.generation_config is settings
    assert settings.to_dict() == before
    model.model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generated(engine, prompts)
    assert model.generation_config is settings
    assert all(m.training for m in engine.modules())


def test_an_answer_ends_where_the_model_has_no_more_positions() -> None:
    long = [2 + index % 40 for index in range(POSITIONS - 3)]
    assert [len(ids) for ids in generated(ToyEngine(), [long], stop_ids=())] == [3]
    _, answers = run_evaluation(
        ToyEngine(), toy_rows(1), template=NeverStops(), max_new_tokens=2 * POSITIONS
    )
    assert not answers[0].ended
    assert answers[0].tokens == POSITIONS - len(ToyTemplate().prompt_ids(toy_examples(1)[0]))


def test_loss_and_answers_are_computed_in_the_runs_precision() -> None:
    engine = ToyEngine()
    seen: list[tuple[bool, bool, torch.dtype]] = []
    layer = engine.hf.get_base_model().model.layers[0].self_attn.q_proj
    layer.register_forward_hook(
        lambda _, __, out: seen.append(
            (torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), out.dtype)
        )
    )
    run_evaluation(
        engine,
        toy_rows(2),
        autocast=lambda: torch.autocast("cpu", torch.bfloat16),
        max_new_tokens=3,
    )
    assert len(seen) >= 4
    assert set(seen) == {(True, False, torch.bfloat16)}
    assert not torch.is_autocast_enabled("cpu")


def test_answers_are_batched_apart_from_losses_and_stay_the_same() -> None:
    """`answer_batch` prompts go through a pass, whatever `batch_size` is: 9 in 4 + 4 + 1."""
    engine, prompts = ToyEngine(), prompts_of(9)
    one_by_one = generated(engine, prompts, batch_size=1)
    seen: list[tuple[int, int]] = []
    engine.hf.get_base_model().model.layers[0].register_forward_pre_hook(
        lambda _, args: seen.append(tuple(args[0].shape[:2]))
    )
    assert generated(engine, prompts, batch_size=2, answer_batch=4) == one_by_one
    assert [rows for rows, width in seen if width > 1] == [4, 4, 1]
