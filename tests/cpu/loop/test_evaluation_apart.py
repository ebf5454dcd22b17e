"""Training does not notice an evaluation."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from evaluation_toys import (
    CPU,
    PAD,
    ToyEngine,
    run_evaluation,
    toy_rows,
    toy_setup,
    train,
    without_seconds,
)
from torch import nn
from toy_answers import generated, prompts_of

from glassloop.base.tokenizer import load_tokenizer
from glassloop.config import DataConfig, LoraConfig, ModelConfig
from glassloop.data.batches import build_pass
from glassloop.data.rows import Example, Row, Turn
from glassloop.data.templates import make_template
from glassloop.engines.build import build_engine
from glassloop.engines.peft import PeftEngine
from glassloop.loop.evaluation import row_losses
from glassloop.loop.generation import unchanged
from glassloop.record.records import EvaluationRecord

# --- training does not notice ---


@pytest.mark.parametrize("four_bit", [False, True])
def test_an_update_after_evaluation_and_generation_has_the_same_bits(four_bit: bool) -> None:
    """Before, amid and after each of three updates, with dropout and checkpointing; four_bit:
    bitsandbytes' own layers."""
    plain = train(ToyEngine(four_bit=four_bit), 3)
    engine = ToyEngine(four_bit=four_bit)
    assert (
        type(engine.hf.get_base_model().model.layers[0].mlp.up_proj.base_layer).__name__
        == "Linear4bit"
    ) == four_bit
    watched = train(engine, 3, between=lambda _: run_evaluation(engine, toy_rows(3)))
    assert torch.equal(plain, watched), (plain - watched).abs().max()


@pytest.mark.parametrize("base", ["tiny_llama", "tiny_qwen2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_trainers_own_engine_template_and_tokenizer(
    base: str, precision: str, request: pytest.FixtureRequest
) -> None:
    model = ModelConfig(id=str(request.getfixturevalue(base)))
    tokenizer = load_tokenizer(model)
    question = Turn(
        "user", "Is this a scam? The caller asks for the code that was sent to your phone."
    )
    examples = (
        Example(
            "a", (question, Turn("assistant", "Verdict: scam", "It asks for a code.")), label="scam"
        ),
        Example(
            "b",
            (question, Turn("assistant", "Verdict: honest", "Nothing is asked for.")),
            label="honest",
        ),
        Example("c", (question, Turn("assistant", "It is about a code.", "See above."))),
    )
    template = make_template(DataConfig(template="chat"), tokenizer, examples)

    def autocast() -> AbstractContextManager:
        return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")

    def fresh() -> PeftEngine:
        lora = LoraConfig(r=4, alpha=8, dropout=0.1)
        return build_engine(
            model,
            lora,
            precision=precision,
            checkpointing=True,
            seed=0,
            device=CPU,
            first=nullcontext,
        )

    def look(_: int) -> None:
        record, answers = run_evaluation(
            engine,
            tuple(template.encode_many(examples)),
            examples=examples,
            template=template,
            tokenizer=tokenizer,
            pad_id=tokenizer.pad_token_id,
            autocast=autocast,
            max_new_tokens=5,
        )
        records.append(record)
        assert [one.tokens == 5 or one.ended for one in answers] == [True] * 3
        assert answers[0].prompt == tokenizer.decode(template.prompt_ids(examples[0]))
        assert answers[0].prompt.endswith("<|assistant|>")

    records: list[EvaluationRecord] = []
    plain = train(fresh(), 2, autocast=autocast)
    engine = fresh()
    watched = train(engine, 2, between=look, autocast=autocast)
    assert torch.equal(plain, watched), (plain - watched).abs().max()
    first, last = records[0], records[-1]
    assert first.base == first.scores, "fresh adapters change nothing"
    assert last.base == first.base
    assert last.loss_nats != first.loss_nats
    assert (first.scores["verdict_rows"], first.scores["reasoning_rows"]) == (2, 3)


def test_dropout_is_off_in_evaluation_and_on_again_afterwards() -> None:
    engine = ToyEngine(dropout=0.5)
    one, other = (run_evaluation(engine, toy_rows(4)) for _ in range(2))
    assert without_seconds(one[0]) == without_seconds(other[0])
    assert one[1] == other[1]
    p = build_pass(toy_rows(2), packed=False, pad_id=PAD, device=CPU)
    assert engine(p)[0] != engine(p)[0]


def test_modes_and_flags_come_back_one_by_one() -> None:
    """A module that was set to evaluation mode, or a frozen adapter, stays so: PEFT alone would set
    the flag."""
    engine = ToyEngine()
    layer = engine.hf.get_base_model().model.layers[0]
    layer.mlp.eval()
    frozen = layer.self_attn.q_proj.lora_A["default"].weight.requires_grad_(False)
    modes = {name: m.training for name, m in engine.named_modules()}
    flags = {name: p.requires_grad for name, p in engine.named_parameters()}
    config = engine.hf.config.to_dict()
    run_evaluation(engine, toy_rows(3))
    assert {name: m.training for name, m in engine.named_modules()} == modes
    assert {name: p.requires_grad for name, p in engine.named_parameters()} == flags
    assert not frozen.requires_grad
    assert engine.hf.config.to_dict() == config
    assert torch.is_grad_enabled()


def test_random_numbers_drawn_in_evaluation_are_an_error() -> None:
    engine = ToyEngine()
    draws: list[float] = []
    engine.hf.get_base_model().model.register_forward_pre_hook(
        lambda *_: draws.append(torch.rand(1).item())
    )
    with pytest.raises(AssertionError, match="drew random numbers"):
        row_losses(engine, toy_rows(1), toy_setup(batch_size=1))
    with pytest.raises(AssertionError, match="drew random numbers"):
        generated(engine, prompts_of(1))


def test_rotary_tables_that_grew_with_a_held_out_row_are_put_back() -> None:
    """A "dynamic" table made for 40 tokens would change rows of 20, both being beyond the model's
    16 positions."""
    dynamic = {
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    }
    p = build_pass(toy_rows(9), packed=False, pad_id=PAD, device=CPU)
    assert max(p.lengths) > 16
    engine = ToyEngine(dropout=0.0, **dynamic)
    first = engine(p)[0].item()
    run_evaluation(engine, (Row("long", (5,) * 40, (False, *[True] * 39)),), generate_rows=0)
    assert engine(p)[0].item() == first


class KeepsATable(nn.Module):
    """Makes a table at its first call and uses it ever after, as rotary and quantisation code
    does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.table: torch.Tensor | None = None

    def forward(self) -> torch.Tensor:
        if self.table is None:
            self.table = torch.arange(3.0)
        return (self.weight * self.table).sum()


def test_what_a_module_keeps_from_evaluation_can_be_trained_with() -> None:
    module = KeepsATable()
    with unchanged(module, CPU):
        module()
    module().backward()
    assert module.weight.grad is not None
    refused = KeepsATable()
    with torch.inference_mode():
        refused()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        refused().backward()


def test_layers_that_would_be_repacked_are_refused() -> None:
    engine = ToyEngine(four_bit=True)
    engine.hf.get_base_model().model.layers[
        1
    ].mlp.up_proj.base_layer.support_avx512bf16_for_cpu = True
    with pytest.raises(AssertionError, match="would repack 1 4-bit layers"):
        run_evaluation(engine, toy_rows(1))
    with pytest.raises(AssertionError, match="would repack 1 4-bit layers"):
        generated(engine, prompts_of(1))


def test_evaluate_knows_how_many_ranks_there_are() -> None:
    with pytest.raises(AssertionError, match=r"setup.ranks = 2, but 1 answered"):
        run_evaluation(ToyEngine(), toy_rows(2), ranks=2)
