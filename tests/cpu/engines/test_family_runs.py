"""Families of `fused` in whole runs: what is planned for them is what is found."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from family_models import MODELS, saved_model

from glassloop.plan.families import FAMILIES
from train_loop import update_once

NO_TRITON = importlib.util.find_spec("triton") is None
FIRST = {kind: name for name, (kind, _) in reversed(MODELS.items())}  # a model a family


@pytest.mark.parametrize(
    "engine",
    ["peft", pytest.param("fused", marks=pytest.mark.skipif(NO_TRITON, reason="needs triton"))],
)
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind in ("gemma2", "phi3") else pytest.mark.thorough)
        for kind in FAMILIES
    ],
)
def test_a_run_of_each_family_begins_and_updates(
    run_of, tmp_path: Path, tiny_tokenizer, kind: str, engine: str
) -> None:
    more = {"vocab_size": 512, "max_position_embeddings": 512}
    folder, _ = saved_model(FIRST[kind], tmp_path / "model", tiny_tokenizer, **more)
    run = run_of(
        model={"id": str(folder)},
        data={"max_tokens": 40},  # scores of Ministral 3 grow from there on
        execution={"engine": engine, "precision": "fp32"},
    )
    run.begin()
    first = update_once(run, 1)
    assert first is not None and first.record.loss_nats > 0
    said = [line for line in run.header if "attention is eager: the model caps its" in line]
    assert len(said) == (engine == "peft" and kind == "gemma2")
    run.close()
