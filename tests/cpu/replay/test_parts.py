"""Shares, losses and moments of the parts of an update."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from replayed import trained

from glassloop.record.reading import leading_to
from glassloop.replay.bisect import bisect
from glassloop.replay.matrices import MatrixStat, compare
from glassloop.replay.reproduce import carry_out, enter, replayed
from glassloop.replay.start import open_scene
from glassloop.replay.trials import as_32_bit


def test_shares_of_passes_and_rows_add_up_to_the_gradient(whole, tmp_path_factory, tiny_llama):
    run = trained(
        tmp_path_factory.mktemp("dry"),
        tiny_llama,
        lora={"dropout": 0.0},
        schedule={"updates": 3, "warmup_updates": 1},
        record={"capture_updates": [3]},
    )
    scene = open_scene(run, 3, {}).scene
    replayed(scene)
    g = scene.parts.replica.adapters.grad.double().clone()
    for pieces in (
        [one for rank in scene.window.passes for one in rank],
        [(row,) for row in scene.window.rows],
    ):
        total = torch.zeros_like(g)
        for piece in pieces:
            window = replace(scene.window, rows=piece, passes=((piece,),))
            n, states = scene.supervised_tokens, scene.state.rng_states
            carry_out(enter(scene), scene.rows, window, n, states)
            total += scene.parts.replica.adapters.grad.double()
        assert ((total - g).norm() / g.norm()).item() < 1e-6


def test_losses_of_tokens_add_up_to_the_rows(opened):
    found = bisect(opened.scene, None)
    part = next(part for part in found.rows if part.name == found.token_row)
    total = sum(token.loss_nats for token in found.tokens)
    assert len(found.tokens) == part.supervised_tokens
    assert total / part.supervised_tokens == pytest.approx(
        part.loss_nats, rel=0.3
    )  # another draw of dropout
    row = opened.scene.rows[part.row]
    assert [row.input_ids[token.position] for token in found.tokens] == [
        token.token_id for token in found.tokens
    ]


def test_bisecting_leaves_the_scene_as_it_was(opened):
    before = replayed(opened.scene)
    told = []
    bisect(opened.scene, opened.healthy, lambda *one: told.append(one))
    rows = len(opened.scene.window.rows)
    assert [done for done, _, _ in told] == list(range(3 + rows))
    assert {total for _, total, _ in told} == {3 + rows}
    after = replayed(opened.scene)
    assert replace(before, rng_after=()) == replace(after, rng_after=())


def test_8_bit_moments_become_what_bitsandbytes_reads_in_them(opened):
    from bitsandbytes.functional import dequantize_blockwise

    tensors, plain = opened.scene.state.moments
    full, described = as_32_bit((tensors, plain))
    for moment, name in ((1, "exp_avg"), (2, "exp_avg_sq")):
        theirs = dequantize_blockwise(
            tensors[f"state{moment}"],
            absmax=tensors[f"absmax{moment}"],
            code=tensors[f"qmap{moment}"],
            blocksize=256,
        )
        assert torch.equal(full[name], theirs)
    assert float(full["step"]) == plain["values"]["step"] == 6
    assert described["optimizer"] == "AdamW"


def stat(
    layer: int, projection: str, weight: float, grad: float = 1.0, side: str = "A"
) -> MatrixStat:
    return MatrixStat(layer, projection, side, grad, weight, None, None)


def test_growth_of_all_matrices_is_no_departure_and_one_layer_of_two_cannot_hide():
    before = [stat(i, p, 1.0) for i in (0, 1) for p in ("q", "k")]
    grown = [stat(i, p, 30.0) for i in (0, 1) for p in ("q", "k")]
    assert {s.weight_factor for s in compare(grown, before)} == {1.0}
    one = [stat(i, p, 30.0 * (1000 if i else 1)) for i in (0, 1) for p in ("q", "k")]
    assert [s.weight_factor for s in compare(one, before)] == [1.0, 1.0, 1000.0, 1000.0]
    assert [s.weight_factor for s in compare(one, None)] == [1e-3, 1e-3, 1000.0, 1000.0]


def test_the_records_of_a_trajectory_are_those_that_led_to_the_update():
    first = [{"update": u, "attempt": 1} for u in range(1, 8)]
    second = [{"update": u, "attempt": 2} for u in range(4, 7)]  # resumed after 3, ended at 6
    lines = first + second
    assert [record["attempt"] for record in leading_to(lines, 7).values()] == [1] * 7
    assert [record["attempt"] for record in leading_to(lines, 6).values()] == [1, 1, 1, 2, 2, 2]
    assert leading_to(lines, 8) == {}
