"""Places and heads of ranks that share a pass."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glassloop.config.arguments import from_values
from glassloop.data.batches import Batches, build_pass
from glassloop.data.rows import IGNORE, Row
from glassloop.loop.engine_here import check_split
from glassloop.loop.starting import check_shared_rows
from glassloop.plan.engine import Choice, with_engine
from glassloop.plan.split import heads_of_ranks, in_groups, places_of_ranks
from glassloop.plan.steps import make_plan

CPU = torch.device("cpu")
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 99,
    "rms_norm_eps": 1e-5,
}


@given(share=st.integers(1, 6), key_heads=st.integers(1, 9), ranks=st.integers(1, 8))
def test_every_head_has_one_rank_and_its_own_key_head(share, key_heads, ranks):
    heads = share * key_heads
    try:
        found = heads_of_ranks(heads, key_heads, ranks)
    except ValueError as error:
        assert f"{key_heads} key heads cannot be dealt to {ranks} ranks" in str(error)
        assert key_heads < ranks and (ranks % key_heads or share < ranks // key_heads)
        return
    assert [head for one in found for head in range(heads)[one.queries]] == list(range(heads))
    assert not any(one.none for one in found) and len(found) == ranks
    for most in (1, 2, 8):
        groups = in_groups(found, share, most)
        assert len(groups) <= most
        for rank in range(ranks):
            mine = [group[rank] for group in groups]
            own = [head for one in mine for head in range(heads)[one.queries]]
            assert own == list(range(heads)[found[rank].queries])
            for one in mine:
                keys = {head // share for head in range(heads)[one.queries]}
                assert keys == set(range(key_heads)[one.keys])
                counts = {head // share: 0 for head in range(heads)[one.queries]}
                for head in range(heads)[one.queries]:
                    counts[head // share] += 1
                assert len(set(counts.values())) <= 1, "a kernel takes equal groups"


@given(tokens=st.integers(2, 500), ranks=st.integers(1, 8))
def test_places_of_ranks_are_all_places_and_differ_by_one(tokens, ranks):
    places = places_of_ranks(tokens, ranks)
    assert sum(places) == tokens and len(places) == ranks and max(places) - min(places) <= 1


def rows_of(*lengths: int) -> list[Row]:
    return [
        Row(f"r{i}", tuple(range(10 * i, 10 * i + n)), (False,) + (True,) * (n - 1))
        for i, n in enumerate(lengths)
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_parts_of_a_pass_are_the_pass(ranks):
    """A place before the border has its target, whose token lies behind it."""
    rows = rows_of(7, 4)
    whole = build_pass(rows, packed=True, pad_id=0, device=CPU)
    parts = [
        build_pass(rows, packed=True, pad_id=0, device=CPU, share=(rank, ranks))
        for rank in range(ranks)
    ]
    for name in ("input_ids", "targets", "position_ids", "row_of"):
        joined = torch.cat([getattr(one, name) for one in parts], dim=1)
        assert torch.equal(joined, getattr(whole, name)), name
    start = 0
    for one in parts:
        own = (one.targets.flatten() != IGNORE).nonzero().squeeze(1)
        assert torch.equal(one.places, own) and one.lengths == whole.lengths
        start += one.slot_tokens
    assert start == 11 and sum(one.real_tokens for one in parts) == 11
    assert sum(one.supervised_tokens for one in parts) == whole.supervised_tokens == 9
    if ranks == 2:  # 11 places: 5 and 6; the last target of rank 0 is rank 1's first token
        assert parts[0].targets[0, -1] == parts[1].input_ids[0, 0] == 5


def test_a_part_without_labels_has_a_place_that_counts_as_0():
    row = Row("r", tuple(range(3, 11)), (False,) * 6 + (True,) * 2)
    first, last = (
        build_pass([row], packed=True, pad_id=0, device=CPU, share=(rank, 2)) for rank in (0, 1)
    )
    assert first.part is not None and last.part is not None
    assert first.part.idle and not last.part.idle
    assert (first.supervised_tokens, last.supervised_tokens) == (0, 2)
    assert first.places.tolist() == [0] and first.targets[0, 0] >= 0
    assert first.part.places == last.part.places == (4, 4)


def batches_of(*lengths: int, ranks: int = 2, layout: str = "split") -> Batches:
    plan = make_plan(
        rows=len(lengths), size=2, ranks=ranks, accumulation=1, tail="keep", updates=2, epochs=1.0,
        warmup=0, warmup_share=0.0, peak=1.0, kind="linear", first="zero",
    )  # fmt: skip
    return Batches(rows_of(*lengths), plan, 0, layout, 20)


def test_an_update_has_the_rows_of_packed_passes_and_rank_0_holds_them():
    split, packed = (batches_of(9, 12, 5, 3, layout=layout) for layout in ("split", "packed"))
    for update in (1, 2):
        one, other = split.window(update), packed.window(update)
        assert one.rows == other.rows and one.packed and one.split and not other.split
        assert sorted(row for one in one.passes[0] for row in one) == sorted(one.rows)
        assert one.passes[1] == () and one.computed_by(1) == one.computed_by(0) == one.passes[0]
        assert max(split.slots(rows) for rows in one.passes[0]) <= 20
    heaviest = split.heaviest()
    assert heaviest.split and heaviest.computed_by(1) == heaviest.passes[0]
    assert not batches_of(9, 12, 5, 3, ranks=1).window(1).split


def test_a_row_of_fewer_tokens_than_ranks_is_refused_by_name():
    check_shared_rows(batches_of(9, 2))
    check_shared_rows(batches_of(9, 1, layout="packed"))
    with pytest.raises(ValueError, match=r"split: row r1 has 1 tokens, fewer than the 2 ranks"):
        check_shared_rows(batches_of(9, 1))


def test_heads_that_ranks_cannot_share_are_refused_before_a_weight_is_read():
    config = from_values({"execution": {"layout": "split", "engine": "fused"}})
    check_split(config, LLAMA, 3)
    check_split(config, LLAMA, 6)
    for ranks in (4, 9, 12):
        with pytest.raises(ValueError, match=r"6 query heads over 3 key heads cannot be dealt"):
            check_split(config, LLAMA, ranks)
    check_split(from_values({"execution": {"layout": "packed"}}), LLAMA, 4)


def test_engines_that_share_nothing_are_refused_by_field():
    for engine in ("peft", "unsloth"):
        with pytest.raises(ValueError, match=r"execution.layout = split needs .* it is " + engine):
            from_values({"execution": {"layout": "split", "engine": engine}})
    config = from_values({"execution": {"layout": "split"}})
    with pytest.raises(ValueError, match=r"auto chose peft \(no CUDA GPU\)"):
        with_engine(config, Choice("peft", "no CUDA GPU"))
    assert with_engine(config, Choice("fused")).execution.engine == "fused"


def test_a_rank_without_memory_ends_at_once_where_others_wait_inside_its_pass():
    """They would wait for it until collective_timeout_s."""
    from types import SimpleNamespace

    from glassloop.loop.replica import SharedPassFailed
    from train_loop import run_passes

    def engine(p):
        raise torch.OutOfMemoryError("CUDA out of memory")

    scale, batches = SimpleNamespace(value=1.0), batches_of(9, 12)
    replica = SimpleNamespace(
        engine=engine, device=CPU, rank=1, ranks=2, pad_id=0, ddp=False, scale=scale
    )
    with pytest.raises(SharedPassFailed, match="rank 1 ran out of memory: CUDA out of memory"):
        run_passes(replica, batches.rows, batches.window(1), 5)  # type: ignore[arg-type]
    packed = batches_of(9, 12, layout="packed")
    assert run_passes(replica, packed.rows, packed.window(1), 5).out_of_memory  # type: ignore[arg-type]
