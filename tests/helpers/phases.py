"""Bytes of a fused pass, by phase, against the plan's ledger."""

from __future__ import annotations

import torch
from live_bytes import fused_peaks

from glassloop.config import PROJECTIONS, LoraConfig
from glassloop.data.batches import build_pass
from glassloop.data.rows import Row
from glassloop.formula.optim import FlatAdapters
from glassloop.predict.ledger import ledger_of
from glassloop.predict.shapes import shapes_of
from glassloop.predict.terms import Work

BETWEEN_PASSES = (
    "linear weights",
    "their scales",
    "embedding",
    "adapters",
    "their gradients",
    "state of",
    "cuBLAS",
    "weights",
    "gradients of",
)  # terms that begin so


def fused_of(engine):
    from glassloop.engines.fused.engine import FusedEngine

    return FusedEngine(engine.hf, engine.report)


def row_of(tokens: int, supervised: int, name: str) -> Row:
    mask = (False,) * (tokens - supervised) + (True,) * supervised
    return Row(name, tuple((7 * place) % 400 for place in range(tokens)), mask)


def check_phases(folder, engine_of, chosen) -> None:
    engine = fused_of(
        engine_of(folder, lora=LoraConfig(r=16), precision="bf16", quantization="nf4")
    )
    engine.use_tiers(chosen)
    adapters = FlatAdapters(engine.hf.named_parameters())
    shapes, _ = shapes_of(str(folder))
    assert shapes is not None
    for rows, tokens, supervised in ((2, 1024, 1023), (1, 1200, 40)):
        batch = [row_of(tokens, supervised, f"row:{i}") for i in range(rows)]
        p = build_pass(batch, packed=True, pad_id=0, device=torch.device("cpu"))
        fused_peaks(engine, adapters, p)  # the first pass makes what stays
        found = fused_peaks(engine, adapters, p)
        work = Work(1, rows * tokens, 16, PROJECTIONS, p.supervised_tokens, tiers=chosen)
        terms = ledger_of(shapes, work, "fused").terms
        for phase, measured in found.items():
            moving = sum(
                term.size_bytes
                for term in terms
                if phase in term.phases
                and not term.what.startswith((*BETWEEN_PASSES, "ids, targets"))
            )
            room = (
                1.01 if phase == "forward" else 1.2
            )  # the engine's own choice leaves some room in the head and in backward
            assert 0.99 * measured <= moving <= room * measured, (
                phase,
                rows,
                tokens,
                moving / measured,
            )
