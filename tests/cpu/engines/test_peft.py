"""The engine: what it computes, what it trains, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft_passes import EngineOf, gradient, pass_of, randomise_b, rows_of
from transformers import MistralConfig, MistralForCausalLM

# --- what it computes


def test_loss_sums_are_the_models_own_loss(engine_of: EngineOf, folder: Path) -> None:
    """A row's sum is transformers' loss times its supervised tokens.

    The total is the sum of the rows.
    """
    engine, rows = engine_of(folder), rows_of(13, 7, 22)
    randomise_b(engine)
    with torch.no_grad():
        loss_sum, row_loss_sums = engine(pass_of(rows))
        expected = []
        for row in rows:
            ids = torch.tensor([row.input_ids])
            labels = torch.where(torch.tensor([row.supervised]), ids, -100)
            expected.append(engine.hf(input_ids=ids, labels=labels).loss * row.supervised_tokens)
    assert loss_sum.dtype == row_loss_sums.dtype == torch.float32
    torch.testing.assert_close(row_loss_sums, torch.stack(expected), rtol=1e-6, atol=0)
    torch.testing.assert_close(loss_sum, sum(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_pass_equals_padded_pass(engine_of: EngineOf, folder: Path, attention: str) -> None:
    engine, rows = engine_of(folder, attention=attention), rows_of(13, 1, 7, 22)
    randomise_b(engine)
    padded, packed = pass_of(rows), pass_of(rows, packed=True)
    torch.testing.assert_close(engine(packed)[1], engine(padded)[1], rtol=1e-6, atol=1e-6)
    one, other = gradient(engine, padded), gradient(engine, packed)
    assert float((one - other).norm() / one.norm()) < 1e-6


def test_packed_rows_keep_a_sliding_window(engine_of: EngineOf, tmp_path: Path) -> None:
    """Layers that see 4 places do so in packed passes too."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
        sliding_window=4, initializer_range=0.1,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path)
    engine, rows = engine_of(tmp_path), rows_of(13, 9)
    torch.testing.assert_close(
        engine(pass_of(rows, packed=True))[1], engine(pass_of(rows))[1], rtol=1e-6, atol=1e-6
    )
    wide = engine_of(tmp_path)
    wide.hf.config.sliding_window = None  # type: ignore[union-attr]
    assert not torch.allclose(wide(pass_of(rows))[1], engine(pass_of(rows))[1], rtol=1e-4), (
        "the window had no effect"
    )


def test_padding_changes_no_row(engine_of: EngineOf, folder: Path) -> None:
    engine, rows = engine_of(folder), rows_of(9, 30)
    alone, beside = engine(pass_of(rows[:1]))[1], engine(pass_of(rows))[1]
    torch.testing.assert_close(alone[0], beside[0], rtol=1e-6, atol=0)


def test_padded_pass_leaves_attention_without_a_mask(
    engine_of: EngineOf, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No mask and is_causal: the form of the flash kernel.

    scaled_dot_product_attention may take it then.
    """
    seen = []
    real = F.scaled_dot_product_attention

    def spy(
        *args: object,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        **rest: object,
    ) -> torch.Tensor:
        seen.append((attn_mask, is_causal))
        return real(*args, attn_mask=attn_mask, is_causal=is_causal, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    engine_of(tiny_llama)(pass_of(rows_of(5, 9)))
    assert len(seen) > 2
    assert all(mask is None and causal for mask, causal in seen[-2:])


def test_packed_is_refused_where_rows_see_each_other(
    engine_of: EngineOf, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder that attends over the whole pass is found out.

    It takes position_ids all the same.
    """
    engine = engine_of(tiny_llama)
    decoder = engine.hf.get_base_model().get_decoder()  # type: ignore[operator]
    real = decoder.forward

    def leaky(*args: object, position_ids: torch.Tensor | None = None, **rest: object) -> object:
        mask = (
            None
            if position_ids is None
            else torch.ones(1, 1, *[position_ids.shape[1]] * 2, dtype=torch.bool).tril()
        )
        return real(*args, position_ids=position_ids, attention_mask=mask, **rest)

    monkeypatch.setattr(decoder, "forward", leaky)
    with pytest.raises(
        ValueError, match=r"execution.layout = packed: LlamaForCausalLM .*execution.layout=literal"
    ):
        engine(pass_of(rows_of(5, 9), packed=True))
    monkeypatch.setattr(decoder, "forward", lambda input_ids, use_cache: None)
    with pytest.raises(ValueError, match=r"takes no position_ids .*execution.layout=literal"):
        engine(pass_of(rows_of(5, 9), packed=True))
    assert engine.training
