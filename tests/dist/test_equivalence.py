"""An update's layout does not change the update.

The layouts vary micro-batches, ranks, padding, packing, recomputation, reduction, probes and
clipping. The reference is the formula, which transformers and PEFT compute row by row without
the loop.
"""

from __future__ import annotations

import pytest
from verify_part import in_part, part

from glassloop.predict.tiers import HOSTS
from glassloop.verify.members import SHAPES, members, reference_of
from glassloop.verify.mutants import MUTANTS
from glassloop.verify.problem import TASKS

MEMBERS = [member for member in members() if member.engine == "peft"]
# Those that a session without thorough tests leaves out are on another base there.
EACH = [
    pytest.param(one.name, marks=() if in_part(one) else pytest.mark.thorough) for one in MEMBERS
]


@pytest.fixture(scope="module")
def distances(verified) -> dict[str, dict[str, float]]:
    """L2 distance to the formula, relative to it, by member and by what was compared."""
    assert verified.stdout, verified.stderr[-6000:]
    return {
        verdict["name"]: verdict["distances"]
        for verdict in verified.output["verdicts"]
        if verdict["kind"] == "member"
    }


@pytest.mark.parametrize("member", EACH)
def test_the_gradient_at_equal_weights_is_the_same(distances, member):
    assert distances[member]["gradient"] <= 1e-6


@pytest.mark.parametrize("member", EACH)
def test_five_updates_of_sgd_end_in_the_same_place(distances, member):
    assert distances[member]["sgd"] <= 2e-6


@pytest.mark.parametrize("member", EACH)
def test_five_updates_of_8_bit_adamw_make_the_same_change(distances, member):
    assert distances[member]["adamw_8bit"] <= 1e-3


def test_the_class_holds_every_layout_on_one_rank_and_two_with_both_reductions_and_bases():
    ways = {(s.ranks, s.layout, s.reduction, s.recomputed) for s in SHAPES.values()}
    assert {
        (ranks, "literal", "explicit", recomputed)
        for ranks in (1, 2)
        for recomputed in (False, True)
    } <= ways
    assert {
        (1, "packed", "explicit", False),
        (2, "packed", "explicit", False),
        (2, "packed", "ddp", False),
    } <= ways
    assert {(2, "literal", "ddp", recomputed) for recomputed in (False, True)} <= ways
    assert any(shape.pass_tokens for shape in SHAPES.values()), "packed in small passes"
    assert {task.quantization for task in TASKS.values()} == {"nf4", "none"}
    everywhere = [name for name, shape in SHAPES.items() if not shape.needs_fused]
    assert {f"{task} peft {shape}" for task in ("nf4", "plain") for shape in everywhere} <= {
        member.name for member in MEMBERS
    }


def test_the_part_without_thorough_tests_holds_every_shape_and_what_mutants_differ_from():
    chosen = part()
    assert {member.shape for member in chosen} == set(SHAPES)
    assert {mutant.sound for mutant in MUTANTS} <= set(chosen)
    assert {reference_of(task) for task in TASKS} <= set(chosen)
    for task in ("nf4", "plain"):
        shapes = [SHAPES[member.shape] for member in chosen if member.task == task]
        assert {1, 2} == {shape.ranks for shape in shapes}
        assert {"literal", "packed"} <= {shape.layout for shape in shapes}
        assert {"explicit", "ddp"} == {shape.reduction for shape in shapes}


def test_the_class_holds_every_way_to_spend_memory():
    fused = {member.shape for member in members() if member.engine == "fused"}
    shapes = [SHAPES[name] for name in fused]
    for ranks in (1, 2):
        mine = [shape for shape in shapes if shape.ranks == ranks]
        assert {"auto", "host"} <= {shape.base for shape in mine}
        assert any(shape.chunk for shape in mine)
    assert {shape.host for shape in shapes} == set(HOSTS)
    assert "sharded" in {shape.base for shape in shapes}
    assert "split" in {shape.layout for shape in shapes}
