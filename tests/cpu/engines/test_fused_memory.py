"""Memory tiers of the fused engine: chosen, kept, resumed and given up."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from fused_engines import fused_of

from glassloop.predict.choice import Asked, Room, choose
from glassloop.predict.tiers import HOSTS, Tiers, held_bytes, input_bytes, kept_bytes, room_bytes

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton, which has no build for this system",
)


def test_memory_is_spent_on_as_many_layers_as_fit(engine_of, tiny_llama):
    one = fused_of(engine_of(tiny_llama, quantization="nf4")).layers[0].sizes
    tokens, gib = 100_000, 2**30

    def tiers(profile, free_gib=1000.0, host_gib=1000.0):
        asked = Asked(profile, tokens, tokens, host_bytes=int(host_gib * gib))
        return choose(asked, Room(gib, int(free_gib * gib)), one, 16)

    assert kept_bytes(one, tokens) > 5 * input_bytes(one, tokens)
    assert tiers("min") == Tiers(1, "all") and tiers("min", host_gib=0) == Tiers(1)
    assert tiers("fill") == Tiers(16, held=16) == tiers(900.0)
    free = [quarter / 4 for quarter in range(40)]
    found = [tiers("fill", free_gib=f).kept for f in free]
    assert found == sorted(found) and len(set(found)) > 5 and found[0] == 0
    assert all(
        t.held == 0 or t.kept == 16 for t in (tiers("fill", free_gib=f) for f in free)
    )  # activations first
    low, high = 0, 100 * gib  # the least at which all are kept, by bisection
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if tiers("fill", free_gib=middle / gib).kept == 16 else (middle, high)
        )
    steps = [
        tiers("fill", free_gib=(high + 1.05 * held_bytes(one) * count) / gib).held
        for count in range(18)
    ]
    assert steps == [*range(17), 16]  # then weights, one layer's after the other
    assert tiers(3.0).kept == tiers("fill", free_gib=2.0).kept  # a GiB is in use already
    # Too small a budget: the least, and preflight says what it takes.
    assert tiers(0.1) == Tiers(0, "inputs", chunk=8192)


def test_of_the_host_the_most_that_fits_is_taken(engine_of, tiny_llama):
    """On the host and, for two layers on their way, on the GPU."""
    one = fused_of(engine_of(tiny_llama, quantization="nf4")).layers[0].sizes
    tokens, layers, gib = 100_000, 16, 2**30

    def host(host_bytes, free=100 * gib, embedding=0):
        room = Room(gib, free, embedding=embedding)
        return choose(Asked("min", tokens, tokens, host_bytes), room, one, layers).host

    needs = {name: room_bytes(one, tokens, layers - 1, name) for name in HOSTS}
    assert [host(needs[name]) for name in HOSTS] == list(HOSTS)
    assert [host(needs[name] - 1) for name in HOSTS[1:]] == list(HOSTS[:-1])
    assert needs["all"] == 15 * (100_000 * 4 * 3 * 64 + (-100_000 * 4 * 3 * 64) % 4096)
    found = [host(needs["all"], free) for free in range(gib // 2, 3 * gib, gib // 128)]
    steps = [HOSTS.index(name) for name in found]
    assert steps == sorted(steps) and set(steps) == {1, 2, 3}
    short = range(gib // 2, 3 * gib, gib // 128)[steps.index(3) - 1]
    assert host(needs["all"], short) == "attention"
    assert host(needs["all"], short, embedding=gib // 64) == "all"  # which then leaves the GPU


def test_an_old_checkpoint_says_true_or_false_of_the_host():
    old = {"kept": 1, "host": True, "held": 0}
    assert Tiers.of(old) == Tiers(1, "all") and Tiers.of(old | {"host": False}) == Tiers(1)
    assert Tiers.of({"kept": 2, "host": "inputs", "streamed": 3}) == Tiers(2, "inputs", streamed=3)


def test_tiers_of_a_resumed_run_are_kept_where_there_is_room():
    assert Tiers(2).no_more_than(Tiers(3)) and not Tiers(3).no_more_than(Tiers(2))
    assert Tiers(1, "inputs").no_more_than(Tiers(1, "all"))
    assert not Tiers(1, "all").no_more_than(Tiers(1, "inputs"))
    # Inputs on the GPU take more of it than any on the host.
    assert Tiers(1, "all").no_more_than(Tiers(1)) and not Tiers(1).no_more_than(Tiers(1, "all"))


def test_a_run_goes_on_from_its_checkpoint_with_the_same_tiers_and_bits(run_of):
    from train_loop import update_once

    how = {
        "execution": {"engine": "fused", "precision": "fp32", "layout": "packed"},
        "memory": {"profile": "min"},
    }
    run = run_of(**how)
    assert (
        run.tiers == {"kept": 1, "host": "nothing", "held": 0, "streamed": 0, "chunk": 0}
        and "1 of 2 layers kept, inputs of the others" in run.header[-1]
    )
    run.begin()
    for u in (1, 2):
        run.tell(update_once(run, u))
    run.save(2)
    run.tell(update_once(run, 3))
    run.close_observers()
    went_on = run_of(**how, resume={"run": str(run.folder)})
    assert went_on.first_update == 3 and went_on.tiers == run.tiers
    update_once(went_on, 3)
    for name, p in went_on.replica.adapters.parameters.items():
        assert torch.equal(p, run.replica.adapters.parameters[name]), name
    went_on.close_observers()


def test_weights_held_before_do_not_count_as_taken_when_memory_is_spent_anew(run_of, monkeypatch):
    """As in a benchmark's arm, whose rows come after the run."""
    from glassloop.loop.spending import spend_memory

    run = run_of(execution={"engine": "fused", "precision": "fp32"})
    engine = run.replica.plain_engine
    engine.use_tiers(Tiers(2, host="nothing", held=2))
    held = []

    def choose_tiers(*_, **__):
        held.extend(linear.held for layer in engine.layers for linear in layer.linears)
        return Tiers(2, host="nothing")

    monkeypatch.setattr(engine, "choose_tiers", choose_tiers)
    spend_memory(run)
    assert held and not any(one is not None for one in held)


def test_memory_that_ran_out_first_costs_kept_layers_and_then_rows(run_of):
    """Rows an update and the gradient stay either way."""
    from glassloop.loop.memory import smaller_passes

    run = run_of(
        execution={"engine": "fused", "precision": "fp32", "layout": "packed"},
        memory={"base": "gpu"},
    )
    assert run.tiers == {"kept": 2, "host": "nothing", "held": 0, "streamed": 0, "chunk": 0}
    told = []
    run.event = lambda update, kind, message, *_: told.append(message)
    kept = []
    while run.batches.halvings == 0:
        assert smaller_passes(run, 1, "rank 0 ran out of memory")
        kept.append(run.tiers["kept"])
    assert kept == [1, 1] and run.replica.plain_engine.tiers.kept == 1
    assert "1 of 2 layers kept" in told[0] and "half the rows" in told[1]


def test_tiers_are_told_in_words():
    from glassloop.predict.choice import describe

    assert describe(Tiers(32, held=4), 32) == "32 of 32 layers kept, weights of 4 held in 16 bits"
    assert describe(Tiers(0, "inputs", streamed=9, chunk=8192), 32) == (
        "0 of 32 layers kept, inputs alone of the others on the host, products over 8,192 tokens "
        "at a time, 4-bit weights of 9 streamed from the host"
    )
