"""Checks of held-out evaluation on two ranks, and toys that tests of one process share.

A check takes the rank and the number of ranks. It raises AssertionError where a promise is broken.
`accelerate launch --config_file accelerate_configs/... evaluation_checks.py` runs all of them.
"""

from __future__ import annotations

import dataclasses
import random
from contextlib import nullcontext
from typing import Any

import bitsandbytes as bnb
import pytest
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
    """A two-layer Llama with LoRA, 4-bit where asked, that keeps to the engine's contract."""

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
    """Rows of uneven length; every fifth, beginning with the third, has no supervised token."""
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


def check_two_ranks_find_what_one_process_finds(rank: int, ranks: int) -> None:
    """For 1 to 9 rows: one alone leaves a rank without rows, an odd number leaves ranks uneven."""
    engine = ToyEngine()
    for count in range(1, 10):
        rows = toy_rows(count)
        for batch_size in (
            1,
            2,
        ):  # of one row, no padding comes in and the sums must agree to the last bit
            alone, answers_alone = run_evaluation(engine, rows, batch_size=batch_size)
            shared, answers_shared = run_evaluation(
                engine, rows, rank=rank, ranks=ranks, batch_size=batch_size
            )
            assert answers_shared == answers_alone
            assert len(answers_alone) == count
            assert alone.base is not None
            assert shared.base is not None
            bound = 0.0 if batch_size == 1 else 1e-6
            for one, other in ((alone.scores, shared.scores), (alone.base, shared.base)):
                assert {**one, "loss_nats": None} == {**other, "loss_nats": None}, (
                    count,
                    one,
                    other,
                )
                assert one["loss_nats"] is not None
                assert other["loss_nats"] is not None
                assert abs(one["loss_nats"] - other["loss_nats"]) <= bound * one["loss_nats"], (
                    count,
                    one,
                    other,
                )
            assert (alone.rows, alone.supervised_tokens) == (shared.rows, shared.supervised_tokens)
            records: list[Any] = [None] * ranks
            torch.distributed.all_gather_object(records, without_seconds(shared))
            assert all(record == records[0] for record in records), "ranks hold different records"


def check_uneven_answers_end(rank: int, ranks: int) -> None:
    """Let one rank's answers reach the limit, the other's have one token, or none at all."""

    class Uneven(ToyTemplate):
        stop_ids = tuple(range(VOCABULARY)) if rank == 0 else ()

    for count in (1, 2, 5):
        _, answers = run_evaluation(
            ToyEngine(),
            toy_rows(count),
            rank=rank,
            ranks=ranks,
            template=Uneven(),
            max_new_tokens=24,
        )
        assert [one.tokens for one in answers] == [
            1 if index % ranks == 0 else 24 for index in range(count)
        ]
    record, answers = run_evaluation(
        ToyEngine(), toy_rows(5), rank=rank, ranks=ranks, generate_rows=1
    )
    assert len(answers) == 1
    assert record.scores["answers"] == 1


def check_answers_alone_come_in_the_order_of_their_rows(rank: int, ranks: int) -> None:
    engine = ToyEngine()
    for count in (0, 1, 5):
        alone, together = (
            answer_toys(engine, count),
            answer_toys(engine, count, rank=rank, ranks=ranks),
        )
        assert together == alone
        assert [one.row_id for one in alone] == [f"toy:{index}" for index in range(count)]


def check_a_failure_on_one_rank_ends_all(rank: int, ranks: int) -> None:
    engine = ToyEngine()
    if rank == ranks - 1:
        engine.hf.get_base_model().lm_head.register_forward_hook(
            _fail
        )  # only generation runs the head as a module
    for call in (
        lambda: run_evaluation(engine, toy_rows(4), rank=rank, ranks=ranks),
        lambda: answer_toys(engine, 4, rank=rank, ranks=ranks),
    ):
        with pytest.raises(RuntimeError, match="the head broke") as caught:
            call()
        assert ("another rank" in str(caught.value)) == (rank != ranks - 1)
    assert engine.training
    assert all(m.training for m in engine.modules())


def _fail(*_: Any) -> None:
    raise RuntimeError("the head broke")


def check_training_does_not_notice(rank: int, ranks: int) -> None:
    """Evaluate before, amid and after each update: the weights keep their bits, no rank waits."""
    bystander = ToyEngine(four_bit=True)
    plain = train(bystander, 3, rank=rank, ranks=ranks)
    engine = ToyEngine(four_bit=True)
    watched = train(
        engine,
        3,
        rank=rank,
        ranks=ranks,
        between=lambda _: run_evaluation(engine, toy_rows(3), rank=rank, ranks=ranks),
    )
    assert torch.equal(plain, watched), (plain - watched).abs().max()


def check_the_ddp_wrapper_is_refused(rank: int, ranks: int) -> None:
    wrapped = nn.parallel.DistributedDataParallel(ToyEngine())
    with pytest.raises(AssertionError, match="not its DDP wrapper"):
        run_evaluation(wrapped, toy_rows(2), rank=rank, ranks=ranks)


CHECKS = (
    check_two_ranks_find_what_one_process_finds,
    check_uneven_answers_end,
    check_answers_alone_come_in_the_order_of_their_rows,
    check_a_failure_on_one_rank_ends_all,
    check_training_does_not_notice,
    check_the_ddp_wrapper_is_refused,
)


def main() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    for check in CHECKS:
        check(accelerator.process_index, accelerator.num_processes)
        accelerator.print(f"ok {check.__name__}", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
