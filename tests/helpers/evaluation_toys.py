"""A toy engine, template and rows to evaluate and to train."""

from __future__ import annotations

import dataclasses
import random
from contextlib import nullcontext
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from glassloop.data.batches import build_pass
from glassloop.data.rows import Example, Pass, Row, Turn
from glassloop.formula.dist import reduce_gradients
from glassloop.formula.loss import token_loss_sums
from glassloop.formula.optim import FlatAdapters, make_optimizer
from glassloop.loop.evaluation import Answer, answer_together, evaluate
from glassloop.loop.generation import EvaluationSetup
from glassloop.record.records import EvaluationRecord

CPU = torch.device("cpu")
PAD, STOP, VOCABULARY, POSITIONS = 0, 1, 48, 64
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class ToyEngine(nn.Module):
    """A two-layer Llama with LoRA that keeps the engine's contract.

    4-bit if asked.
    """

    def __init__(
        self,
        *,
        four_bit: bool = False,
        dropout: float = 0.1,
        checkpointing: bool = True,
        seed: int = 0,
        **config: Any,
    ):
        super().__init__()
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                **{
                    "vocab_size": VOCABULARY,
                    "hidden_size": 64,
                    "intermediate_size": 128,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "max_position_embeddings": POSITIONS,
                    "initializer_range": 0.3,  # far from uniform: the likeliest token is clear
                    "use_cache": False,
                    **config,
                }
            )
        )
        if four_bit:
            to_four_bit(model)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        self.hf: Any = get_peft_model(
            model,
            LoraConfig(
                r=4,
                lora_alpha=4,
                lora_dropout=dropout,
                target_modules=PROJECTIONS,
                task_type="CAUSAL_LM",
            ),
        )
        for name, p in self.hf.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(
                    p, std=0.3
                )  # zero at the start of training; here adapter and base shall differ
        self.train()

    def forward(self, p: Pass) -> tuple[torch.Tensor, torch.Tensor]:
        model = self.hf.get_base_model()
        hidden = model.model(
            input_ids=p.input_ids, position_ids=p.position_ids, use_cache=False
        ).last_hidden_state
        return token_loss_sums(
            hidden, model.lm_head.weight, None, p.targets, p.row_of, len(p.row_ids), places=p.places
        )


def to_four_bit(model: nn.Module) -> None:
    """Put NF4 in place of the projections, without bitsandbytes' repacking for inference."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in PROJECTIONS:
                layer = bnb.nn.Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=False,
                    compute_dtype=torch.float32,
                    quant_type="nf4",
                )
                layer.load_state_dict({"weight": child.weight.data})
                setattr(parent, name, layer.to("cpu"))
                layer.support_avx512bf16_for_cpu = False
    model.is_loaded_in_4bit = True  # PEFT picks its 4-bit layers by this


class ToyTemplate:
    """A prompt of a few ids that the row's number decides."""

    stop_ids = (STOP,)

    def prompt_ids(self, example: Example) -> list[int]:
        draw = random.Random(example.row_id)
        return [draw.randrange(2, VOCABULARY) for _ in range(draw.randrange(3, 12))]


class NeverStops(ToyTemplate):
    stop_ids = ()


class ToyTokenizer:
    def decode(
        self, ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str:
        assert not skip_special_tokens
        assert not clean_up_tokenization_spaces
        words = {2: "</think>", 3: "\nverdict:scam\n", 4: "\nverdict:honest\n"}
        return " ".join(words.get(token, f"t{token}") for token in ids)


def toy_rows(count: int, *, longest: int = 20, seed: int = 0) -> tuple[Row, ...]:
    """Rows of uneven length.

    Every fifth, beginning with the third, has no supervised token.
    """
    draw = random.Random(f"{seed}:{longest}")
    rows = []
    for index in range(count):
        length = draw.randrange(4, longest + 1)
        prompt = length if index % 5 == 2 else draw.randrange(1, length)
        ids = tuple(draw.randrange(2, VOCABULARY) for _ in range(length))
        rows.append(Row(f"toy:{index}", ids, tuple(place >= prompt for place in range(length))))
    return tuple(rows)


def toy_examples(count: int) -> tuple[Example, ...]:
    """Scam and honest calls, rows with reasoning and rows without."""
    return tuple(
        Example(
            f"toy:{index}",
            (
                Turn("user", f"question {index}"),
                Turn("assistant", f"answer {index}", "because" if index % 3 else None),
            ),
            label=("scam", "honest", None)[index % 3 if index % 4 else 2],
        )
        for index in range(count)
    )


SETUP_FIELDS = {field.name for field in dataclasses.fields(EvaluationSetup)}


def toy_setup(**changes: Any) -> EvaluationSetup:
    template = changes.get("template", ToyTemplate())
    fields: dict[str, Any] = {
        "template": template,
        "tokenizer": ToyTokenizer(),
        "stop_ids": template.stop_ids,
        "pad_id": PAD,
        "batch_size": 2,
        "max_new_tokens": 8,
        "device": CPU,
    }
    return EvaluationSetup(**{**fields, **changes})


def run_evaluation(
    engine: nn.Module, rows: tuple[Row, ...], *, rank: int = 0, ranks: int = 1, **changes: Any
):
    """Evaluate with `changes` to the setup or to evaluate()'s own arguments."""
    of_setup = {name: changes.pop(name) for name in tuple(changes) if name in SETUP_FIELDS}
    examples = changes.pop("examples", toy_examples(len(rows)))
    arguments = {"generate_rows": len(rows), "with_base": True, "update": 3, **changes}
    setup = toy_setup(rank=rank, ranks=ranks, **of_setup)
    return evaluate(engine, rows, examples, setup, **arguments)


def answer_toys(engine: ToyEngine, count: int, *, rank: int = 0, ranks: int = 1) -> list[Answer]:
    setup = toy_setup(rank=rank, ranks=ranks, max_new_tokens=6)
    return answer_together(engine.hf, toy_examples(count), setup)


def train(
    engine: nn.Module,
    updates: int,
    *,
    rank: int = 0,
    ranks: int = 1,
    between: Any = None,
    autocast: Any = nullcontext,
) -> torch.Tensor:
    """Flat adapters after updates of two micro-batches a rank.

    `between(update)` runs before, amid and after each.
    """
    adapters = FlatAdapters(engine.named_parameters())
    optimizer = make_optimizer(
        "adamw", adapters.flat, lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01
    )
    torch.manual_seed(11)  # dropout masks: the same with and without evaluation
    for update in range(1, updates + 1):
        rows = [row for row in toy_rows(8 * ranks, seed=update) if row.supervised_tokens][
            : 4 * ranks
        ]
        tokens = sum(row.supervised_tokens for row in rows)
        adapters.zero_grad()
        for micro_batch in range(2):
            if between is not None:
                between(update)
            chosen = rows[rank * 4 + 2 * micro_batch :][:2]
            with autocast():
                loss_sum, _ = engine(build_pass(chosen, packed=False, pad_id=PAD, device=CPU))
            (loss_sum / tokens).backward()
        if between is not None:
            between(update)
        reduce_gradients(adapters.grad)
        adapters.check_views()
        assert adapters.grad.count_nonzero() > 0
        optimizer.step()
    return adapters.flat.detach().clone()


def without_seconds(record: EvaluationRecord) -> EvaluationRecord:
    return dataclasses.replace(record, seconds=0.0)
