"""A base that streams: its memory, its time, the passes that hide it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from glassloop.config import PROJECTIONS
from glassloop.predict.cards import budget_bytes, needed_gib, verdict
from glassloop.predict.fused_time import fused_pass_time, hidden_tokens
from glassloop.predict.hardware import gpu_named
from glassloop.predict.ledger import ledger_of
from glassloop.predict.shapes import KNOWN, shapes_of
from glassloop.predict.spend import HIDING_TOKENS, with_tiers
from glassloop.predict.terms import Work, layer_bytes
from glassloop.predict.tiers import Tiers

R1 = KNOWN["deepseek-ai/DeepSeek-R1-Distill-Llama-8B"]
LLAMA_70B = next(s for s in [shapes_of("deepseek-ai/DeepSeek-R1-Distill-Llama-70B")[0]] if s)
WORK = Work(rows=2, tokens=2048, r=16, targets=PROJECTIONS)
MEASURED = Path(__file__).parents[3] / "benchmarks" / "results" / "streamed-h200.jsonl"


@pytest.mark.parametrize(("key", "streamed"), [("3090", range(45, 60)), ("A100-40", range(10, 25))])
def test_a_base_that_outgrows_a_card_streams_as_few_layers_as_needed(key, streamed):
    gpu, work = gpu_named(key), replace(WORK, packed=True, rows=1, tokens=4096, host_gib=40.0)
    assert gpu is not None
    found = verdict(gpu, LLAMA_70B, work, ranks=1, rows_per_update=16, engine="fused")
    assert found.fits and found.streamed in streamed and found.spare_gib < 3.5
    forced = verdict(
        gpu,
        LLAMA_70B,
        replace(work, base="host", profile="min"),
        ranks=1,
        rows_per_update=16,
        engine="fused",
    )
    assert forced.streamed == 80 and forced.needed_gib < found.needed_gib
    stays = verdict(
        gpu, LLAMA_70B, replace(work, base="gpu"), ranks=1, rows_per_update=16, engine="fused"
    )
    assert not stays.fits and stays.streamed == 0
    assert stays.cure and stays.cure.endswith("memory.base=auto")


def test_a_streamed_layer_leaves_the_ledger_and_two_slots_enter_it():
    work = replace(WORK, tiers=Tiers(1))
    whole = ledger_of(LLAMA_70B, work, "fused")
    one = layer_bytes(LLAMA_70B, work)
    for streamed in (1, 2, 3, 80):
        tiers = Tiers(1, streamed=streamed)
        part = ledger_of(LLAMA_70B, replace(work, tiers=tiers), "fused")
        saved = whole.peak_bytes - part.peak_bytes
        assert saved == pytest.approx((streamed - min(2, streamed)) * one, abs=streamed * 4)


def test_passes_are_raised_until_they_hide_the_copies_of_a_streamed_base():
    work = replace(WORK, rows=1, packed=True, host_gib=40.0, between=(512, 90_000))
    short = replace(work, tokens=512)
    assert with_tiers(LLAMA_70B, short, budget_bytes(23.68, 1)).tokens == HIDING_TOKENS
    tight = with_tiers(LLAMA_70B, short, budget_bytes(8.5, 1))
    assert 512 < tight.tokens < HIDING_TOKENS
    assert needed_gib(LLAMA_70B, tight, 1, "fused") <= 8.5
    assert with_tiers(R1, replace(short, between=(512, 600)), budget_bytes(9.0, 1)).tokens <= 600


def test_the_predicted_speed_is_within_8_percent_of_every_measurement() -> None:
    lines = [json.loads(line) for line in MEASURED.read_text().splitlines()]
    summaries = [line for line in lines if line["kind"] == "summary" and line["layers"] in (32, 80)]
    compared = 0
    for line in summaries:
        shapes = R1 if line["layers"] == 32 else LLAMA_70B
        for base in ("gpu", "host"):
            one = fused_pass_time(
                shapes,
                "H200",
                rows=line["tokens"] / 2048,  # rows of 2,048, as the benchmark draws them
                row_tokens=2048,
                tiers=Tiers(0, streamed=shapes.layers if base == "host" else 0),
            )
            if base in line and one is not None and line["tokens"] >= 4096:
                assert line["tokens"] / one.seconds == pytest.approx(line[base], rel=0.08)
                compared += 1
    assert compared >= 5


@pytest.mark.parametrize("card", ["3090", "4090", "H200"])
def test_copies_hide_from_one_length_on(card: str) -> None:
    row = 2048.0
    known = dict(row_tokens=row, r=16, targets=PROJECTIONS)
    tokens = hidden_tokens(LLAMA_70B, card, streamed=80, **known)  # type: ignore[arg-type]
    assert tokens is not None and 256 < tokens <= HIDING_TOKENS
    for count, waits in ((tokens, False), (tokens - 64, True)):
        sizes = dict(rows=max(1.0, count / row), row_tokens=min(row, count))
        one = fused_pass_time(LLAMA_70B, card, **sizes, tiers=Tiers(0, streamed=80))  # type: ignore[arg-type]
        assert one is not None and (one.waits_s > 0) == waits
        assert one.gpu_s > one.waits_s
    fewer = hidden_tokens(LLAMA_70B, card, streamed=20, **known)  # type: ignore[arg-type]
    assert fewer is not None and fewer < tokens
    assert hidden_tokens(LLAMA_70B, "T4", streamed=80, **known) is None  # type: ignore[arg-type]
