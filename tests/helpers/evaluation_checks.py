"""Checks of held-out evaluation on two ranks.

A check takes the rank and the number of ranks. It raises AssertionError where a promise is broken.
`accelerate launch --config_file accelerate_configs/... evaluation_checks.py` runs all of them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from evaluation_toys import (
    VOCABULARY,
    ToyEngine,
    ToyTemplate,
    answer_toys,
    run_evaluation,
    toy_rows,
    train,
    without_seconds,
)
from torch import nn


def check_two_ranks_find_what_one_process_finds(rank: int, ranks: int) -> None:
    """Compare two ranks with one process, for 1 to 9 rows.

    One row leaves a rank without rows, an odd number leaves ranks uneven.
    """
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
    """Let one rank's answers reach the limit and the other's end early.

    After one token, or none at all.
    """

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
    """Evaluate before, amid and after each update.

    The weights keep their bits, and no rank waits.
    """
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
