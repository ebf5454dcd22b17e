"""Answers over a base that stays on the host, and its checksum, on a card."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from glassloop.base.checksum import CACHE_WORDS, CHUNK_WORDS, _weighted
from glassloop.base.streamed import load_streamed
from glassloop.config import ModelConfig
from glassloop.plan.support import groups_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

NO_ROOM = 2**60  # bytes that are to stay free: no layer is brought


def test_answers_from_the_host_are_those_from_the_card(tiny_llama: Path, tmp_path: Path) -> None:
    model = ModelConfig(id=str(tiny_llama), quantization="nf4", cache_dir=str(tmp_path))
    device, ids = torch.device("cuda", 0), torch.arange(1, 9).unsqueeze(0).cuda()
    logits = []
    for spare_bytes, on_host in ((0, False), (NO_ROOM, True)):
        hf, report, pages = load_streamed(
            model,
            groups_of,
            precision="bf16",
            device=device,
            first=nullcontext,
            locking="must",
            spare_bytes=spare_bytes,
        )
        layers = sum(layer.nbytes for layer in pages.file.manifest.layers)
        assert report.host_bytes == (layers if on_host else 0)
        assert any("stay on the host" in note for note in report.notes) == on_host
        with torch.no_grad():
            logits.append(hf(input_ids=ids, use_cache=False).logits)
        del hf
        pages.close()
    assert torch.equal(*logits)


def test_bases_one_after_the_other_are_each_their_own(
    tiny_llama: Path, tiny_qwen2: Path, tmp_path: Path
) -> None:
    """A driver keeps what is not unlocked: the next file at these addresses read as the first."""
    for folder in (tiny_llama, tiny_qwen2, tiny_llama, tiny_qwen2):
        model = ModelConfig(id=str(folder), quantization="nf4", cache_dir=str(tmp_path))
        device = torch.device("cuda", 0)
        hf, report, pages = load_streamed(
            model, groups_of, precision="bf16", device=device, first=nullcontext, locking="must"
        )  # which compares the base with its checksum
        assert pages.mapped is not None
        del hf, report, pages


@pytest.mark.parametrize("count", [1, CACHE_WORDS + 3, CHUNK_WORDS + 5])
def test_a_card_sums_words_as_a_cpu_does(count: int) -> None:
    drawn = torch.Generator().manual_seed(count)
    words = torch.randint(-(2**63), 2**63 - 1, (count,), generator=drawn)
    there = _weighted(words.cuda(), CHUNK_WORDS, on_cpu=False)
    assert there == _weighted(words, CACHE_WORDS, on_cpu=True)
