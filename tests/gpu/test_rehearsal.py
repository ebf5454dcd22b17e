"""On a card: what was rehearsed is what passes launch, and the first of them compiles nothing."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from absent_card import compiled, forget
from family_models import saved_model
from transformers import AutoConfig

from glassloop.config import ModelConfig
from glassloop.data.batches import build_pass
from glassloop.data.rows import Row
from glassloop.engines.build import build_engine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
WIDER = {"hidden_size": 128, "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}


def test_a_runs_kernels_are_compiled_while_its_base_is_loaded(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glassloop.engines.fused.rehearsal import Quantised, Rehearsal, shapes

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    folder, lora = saved_model("llama", tmp_path / "model", tiny_tokenizer, **WIDER)
    device = torch.device("cuda", torch.cuda.current_device())
    forget()
    config = AutoConfig.from_pretrained(folder)
    beside = Rehearsal(shapes(config, lora, torch.bfloat16, Quantised()), device)
    engine: Any = build_engine(
        ModelConfig(id=str(folder)), lora, precision="bf16", checkpointing=True, seed=0,
        device=device, first=contextlib.nullcontext, engine="fused",
    )  # fmt: skip
    assert beside.end() == ""
    foreseen = set(compiled())
    for parameter in engine.trained:
        parameter.grad = torch.zeros_like(parameter)
    rows = [Row(str(n), tuple(range(5, 5 + n)), (False, *(True,) * (n - 1))) for n in (33, 7, 64)]
    for packed in (True, False):
        p = build_pass(rows, packed=packed, pad_id=0, device=device)
        engine(p)[0].backward()
    torch.cuda.synchronize()
    assert foreseen and set(compiled()) == foreseen
