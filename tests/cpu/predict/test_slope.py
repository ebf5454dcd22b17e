"""Bytes that a token of a long row takes, alive and as planned."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from live_bytes import fused_peaks
from phases import BETWEEN_PASSES, fused_of, row_of

from glassloop.config import PROJECTIONS, LoraConfig
from glassloop.data.batches import build_pass
from glassloop.formula.optim import FlatAdapters
from glassloop.predict.cards import budget_bytes
from glassloop.predict.ledger import ledger_of
from glassloop.predict.longest import longest_row
from glassloop.predict.longest import row_of as one_row
from glassloop.predict.shapes import KNOWN, shapes_of
from glassloop.predict.terms import GIB, Work
from glassloop.predict.tiers import HOSTS, Tiers

R1 = KNOWN["deepseek-ai/DeepSeek-R1-Distill-Llama-8B"]
WORK = Work(rows=1, tokens=1, r=16, targets=PROJECTIONS)
CHUNK = 256
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton, which has no build for this system",
)


@needs_triton
@pytest.mark.parametrize("host", HOSTS)
def test_a_token_of_a_long_row_takes_the_bytes_that_the_ledger_says(wide_llama, engine_of, host):
    """Two lengths of many chunks: what does not grow with tokens is in neither slope."""
    engine = fused_of(
        engine_of(wide_llama, lora=LoraConfig(r=16), precision="bf16", quantization="nf4")
    )
    tiers, lengths = Tiers(0, host, chunk=CHUNK), (2048, 4096)
    engine.use_tiers(tiers)
    adapters = FlatAdapters(engine.hf.named_parameters())
    shapes, _ = shapes_of(str(wide_llama))
    assert shapes is not None
    live, planned = [], []
    for tokens in lengths:
        p = build_pass(
            [row_of(tokens, tokens - 1, "r")], packed=True, pad_id=0, device=torch.device("cpu")
        )
        fused_peaks(engine, adapters, p)  # the first pass makes what stays
        live.append(fused_peaks(engine, adapters, p))
        work = replace(WORK, tokens=tokens, supervised_tokens=tokens - 1, tiers=tiers)
        planned.append(ledger_of(shapes, work, "fused").phases)
    for phase in ("forward", "backward"):
        grown = [
            (many[phase] - few[phase]) / (lengths[1] - lengths[0]) for few, many in (live, planned)
        ]
        ids = 32  # bytes a token that are no tensor of the engine's
        assert grown[0] == pytest.approx(grown[1] - ids, rel=0.03), phase


def test_the_slope_at_200_000_and_700_000_tokens_is_within_its_mark():
    """KiB a token on the card, 8B in 16 bits, inputs alone on the host."""
    for tokens in (200_000, 700_000):
        tiers = Tiers(0, "inputs", streamed=32, chunk=8192)
        few, many = (
            ledger_of(R1, replace(one_row(WORK, count), tiers=tiers), "fused").phases
            for count in (tokens, tokens + 1024)
        )
        slope = {phase: (many[phase] - few[phase]) / 2**20 for phase in ("forward", "backward")}
        assert slope["forward"] < 58 and slope["backward"] < 75


@pytest.mark.parametrize(
    ("card", "host", "tokens"),
    [(8, 64, 15_000), (12, 64, 60_000), (24, 64, 200_000), (80, 200, 700_000)],
)
def test_marks_of_small_cards_are_met_within_their_host(card, host, tokens):
    """Locked host memory counts whole: tensors, embedding and the base."""
    base = 5.0  # GiB, beside layers' tensors
    work = replace(WORK, host_gib=host - base)
    found = longest_row(R1, work, budget_bytes(card * 23.5 / 24, 1))
    assert found.tokens >= tokens and found.host.total_bytes <= host * GIB


@needs_triton
@pytest.mark.parametrize(
    "tiers",
    [Tiers(0), Tiers(2), Tiers(0, "inputs", chunk=CHUNK), Tiers(0, "all", chunk=CHUNK)],
    ids=str,
)
def test_a_rank_that_shares_a_row_takes_what_the_ledger_says(
    wide_llama, engine_of, monkeypatch, tiers
):
    """Rank 0 of two, with an exchange that moves nothing: sizes are those of two ranks."""
    from glassloop.engines.fused import engine as whole
    from glassloop.engines.fused import exchange

    monkeypatch.setattr(exchange, "all_to_all", lambda *_: None)
    monkeypatch.setattr(whole, "rows_of_all", lambda by_row, part: by_row)
    engine = fused_of(
        engine_of(wide_llama, lora=LoraConfig(r=16), precision="bf16", quantization="nf4")
    )
    engine.use_tiers(tiers)
    adapters = FlatAdapters(engine.hf.named_parameters())
    shapes, _ = shapes_of(str(wide_llama))
    assert shapes is not None
    p = build_pass(
        [row_of(4095, 4094, "r")], packed=True, pad_id=0, device=torch.device("cpu"), share=(1, 2)
    )
    fused_peaks(engine, adapters, p)
    found = fused_peaks(engine, adapters, p)
    work = replace(WORK, tokens=4095, supervised_tokens=4094, tiers=tiers, split=2)
    assert work.places == 2048
    terms = ledger_of(shapes, work, "fused").terms
    for phase in ("forward", "backward"):
        said = sum(
            term.size_bytes
            for term in terms
            if phase in term.phases and not term.what.startswith((*BETWEEN_PASSES, "ids, targets"))
        )
        assert 0.99 * found[phase] <= said <= 1.2 * found[phase], (phase, said / found[phase])
