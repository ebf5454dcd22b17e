"""Logits and the decoder's output of one pass, or of two where one would not do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from glassloop.base.checks import check_plain_head
from glassloop.base.one_pass import logits_and_hidden

IDS = torch.arange(1, 5).unsqueeze(0)


@pytest.fixture
def hf(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


def passes_of(hf: Any) -> list[None]:
    """Grows by one with each pass through the first layer."""
    found: list[None] = []
    hf.model.layers[0].register_forward_hook(lambda *_: found.append(None))
    return found


def test_a_plain_model_is_read_once(hf: Any) -> None:
    with torch.no_grad():
        wanted = hf.model(input_ids=IDS, use_cache=False).last_hidden_state
    passes = passes_of(hf)
    logits, hidden = logits_and_hidden(hf, hf.model, IDS)
    assert len(passes) == 1 and torch.equal(hidden, wanted)
    assert torch.equal(logits, hf(input_ids=IDS, use_cache=False).logits)
    assert not hf.model._forward_hooks
    passes.clear()
    check_plain_head(hf, torch.device("cpu"), "org/base")
    assert len(passes) == 1


@pytest.mark.parametrize("way", ["embeddings", "mask", "other ids", "another decoder call"])
def test_a_model_that_gives_its_decoder_more_is_read_again(hf: Any, way: str) -> None:
    with torch.no_grad():
        wanted = hf.model(input_ids=IDS, use_cache=False).last_hidden_state
    real = hf.model.forward

    def forward(input_ids: torch.Tensor, use_cache: bool) -> Any:
        if way == "embeddings":
            embeds = hf.model.embed_tokens(input_ids) * 3
            out = hf.model(inputs_embeds=embeds, use_cache=use_cache)
        elif way == "mask":
            mask = torch.tensor([[0, 1, 1, 1]])
            out = hf.model(input_ids=input_ids, attention_mask=mask, use_cache=use_cache)
        elif way == "other ids":
            out = hf.model(input_ids=input_ids.flip(1), use_cache=use_cache)
        else:  # past the hook
            out = real(input_ids=input_ids, use_cache=use_cache)
            out.last_hidden_state = out.last_hidden_state * 3
        out.logits = hf.lm_head(out.last_hidden_state)
        return out

    hf.forward = forward
    passes = passes_of(hf)
    _, hidden = logits_and_hidden(hf, hf.model, IDS)
    assert len(passes) == 2 and torch.equal(hidden, wanted)
    with pytest.raises(ValueError, match="are not head"):
        check_plain_head(hf, torch.device("cpu"), "org/base")
