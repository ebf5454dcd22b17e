"""fused against the reference: the same sums and gradients.

In fp32 on a CPU, over the same NF4 weights.
"""

from __future__ import annotations

import gc
import importlib.util
import random

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from glassloop.config import LoraConfig
from glassloop.data.batches import build_pass
from glassloop.data.rows import Row
from glassloop.formula.optim import FlatAdapters
from glassloop.predict.choice import Asked, Room, choose
from glassloop.predict.tiers import HOSTS, Tiers, held_bytes, input_bytes, kept_bytes, room_bytes

if importlib.util.find_spec("triton") is not None:
    TIERS = [
        Tiers(kept, host, held)
        for kept, held in ((0, 0), (1, 2), (2, 1), (2, 0), (0, 0))
        for host in HOSTS
    ]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton, which has no build for this system",
)

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def rows_of(*lengths: int) -> list[Row]:
    """Rows of random tokens, half of them labels; the third has none.

    The labels are the last half.
    """
    generator = random.Random(0)
    return [
        Row(
            f"r{i}",
            tuple(generator.randrange(5, 500) for _ in range(n)),
            tuple(i != 2 and place > n // 2 for place in range(n)),
        )
        for i, n in enumerate(lengths)
    ]


def fused_of(engine):
    from glassloop.engines.fused.engine import FusedEngine

    return FusedEngine(engine.hf, engine.report)


def adapters_of(engine) -> FlatAdapters:
    """Flat adapters with values that make every gradient differ from 0."""
    adapters = FlatAdapters(engine.hf.named_parameters())
    torch.manual_seed(3)
    adapters.flat.data.copy_(torch.randn_like(adapters.flat) * 0.05)
    return adapters


def gradient(engine, adapters: FlatAdapters, passes) -> tuple[list, torch.Tensor]:
    adapters.zero_grad()
    found = []
    for p in passes:
        loss_sum, row_loss_sums = engine(p)
        (loss_sum / 7).backward()
        found.append((loss_sum.item(), row_loss_sums))
    return found, adapters.grad.clone()


@pytest.fixture(params=["tiny_llama", "tiny_qwen2", "biased_llama"])
def model(request: pytest.FixtureRequest):
    """Models without biases, with some and a tied head, and with all."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def biased_llama(tmp_path_factory, tiny_llama):
    config = LlamaConfig.from_pretrained(tiny_llama, attention_bias=True, mlp_bias=True)
    torch.manual_seed(1)
    made = LlamaForCausalLM(config)
    for name, parameter in made.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("biased-llama")
    made.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "v_proj"), ("o_proj", "up_proj")])
@pytest.mark.parametrize("packed", [False, True])
def test_sums_and_gradient_are_the_reference_engines(engine_of, model, targets, packed):
    lora = LoraConfig(r=4, alpha=8, targets=targets)
    reference = engine_of(model, quantization="nf4", lora=lora)
    before = adapters_of(reference)
    passes = [
        build_pass(rows_of(*lengths), packed=packed, pad_id=0, device=torch.device("cpu"))
        for lengths in ((9, 17, 5, 30), (4,))
    ]
    wanted, slope = gradient(reference, before, passes)
    engine = fused_of(engine_of(model, quantization="nf4", lora=lora))
    adapters = adapters_of(engine)
    for tiers in TIERS:
        engine.use_tiers(tiers)
        found, ours = gradient(engine, adapters, passes)
        for (sum_a, rows_a), (sum_b, rows_b) in zip(wanted, found, strict=True):
            assert sum_a == pytest.approx(sum_b, rel=1e-6)
            assert torch.allclose(rows_a, rows_b, rtol=1e-6)
        assert float((ours - slope).norm() / slope.norm()) <= 1e-6
    for name, place in adapters.slices.items():
        assert float((place.of(ours) - place.of(slope)).norm() / place.of(slope).norm()) <= 5e-6, (
            name
        )
    with torch.no_grad():
        assert engine(passes[0])[0].item() == pytest.approx(wanted[0][0], rel=1e-6)


def test_without_its_adapters_it_is_the_base_and_with_them_what_it_was(engine_of, model):
    engine = fused_of(engine_of(model, quantization="nf4"))
    reference = engine_of(model, quantization="nf4")  # fresh: B is 0
    adapters_of(engine)
    p = build_pass(rows_of(12, 7), packed=False, pad_id=0, device=torch.device("cpu"))
    for held in (0, 2):
        engine.use_tiers(Tiers(2, host="nothing", held=held))
        with torch.no_grad():
            before = engine(p)[0].item()
            with engine.hf.disable_adapter():
                base = engine(p)[0].item()
            assert base == pytest.approx(reference(p)[0].item(), rel=1e-6)
            assert engine(p)[0].item() == before != base


def test_a_pass_without_labels_adds_nothing(engine_of, tiny_llama):
    engine = fused_of(engine_of(tiny_llama, quantization="nf4"))
    adapters = adapters_of(engine)
    bare = [Row("bare", (5, 6, 7), (False,) * 3), Row("too", (8, 9), (False,) * 2)]
    p = build_pass(bare, packed=True, pad_id=0, device=torch.device("cpu"))
    found, slope = gradient(engine, adapters, [p])
    assert found[0][0] == 0 and found[0][1].tolist() == [0, 0] and not slope.any()


def test_every_tier_gives_the_same_bits(engine_of, tiny_llama):
    engine = fused_of(engine_of(tiny_llama, quantization="nf4"))
    adapters = adapters_of(engine)
    p = build_pass(rows_of(12, 7), packed=True, pad_id=0, device=torch.device("cpu"))
    grads = []
    for tiers in TIERS:
        engine.use_tiers(tiers)
        grads.append(gradient(engine, adapters, [p, p])[1])
    assert all(torch.equal(grads[0], one) for one in grads[1:])


def test_weights_that_are_no_longer_held_are_freed(engine_of, tiny_llama):
    import weakref

    engine = fused_of(engine_of(tiny_llama, quantization="nf4"))
    adapters, p = (
        adapters_of(engine),
        build_pass(rows_of(12), packed=False, pad_id=0, device=torch.device("cpu")),
    )
    engine.use_tiers(Tiers(2, host="nothing", held=2))
    gradient(engine, adapters, [p])
    held = [weakref.ref(linear.held) for layer in engine.layers for linear in layer.linears]
    engine.use_tiers(Tiers(2, host="nothing"))
    gc.collect()
    assert not any(one() is not None for one in held)


def test_adapters_that_moved_are_seen_and_so_are_buffers_that_were_replaced(engine_of, tiny_llama):
    """An optimizer writes in place; a second FlatAdapters moves data.

    Gradients move too.
    """
    engine = fused_of(engine_of(tiny_llama, quantization="nf4"))
    adapters = adapters_of(engine)
    p = build_pass(rows_of(12), packed=False, pad_id=0, device=torch.device("cpu"))
    first, _ = gradient(engine, adapters, [p])
    adapters.flat.data.mul_(3)
    second, _ = gradient(engine, adapters, [p])
    assert first[0][0] != second[0][0]
    other = FlatAdapters(engine.hf.named_parameters())
    third, slope = gradient(engine, other, [p])
    assert third[0][0] == second[0][0] and float(slope.norm()) > 0


def test_the_peft_model_over_the_same_storage_still_answers_as_before(engine_of, tiny_llama):
    reference = engine_of(tiny_llama, quantization="nf4")
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        before = reference.hf(input_ids=ids).logits
        engine = fused_of(reference)
        assert torch.equal(engine.hf(input_ids=ids).logits, before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu', fused knows 'silu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_type = 'dynamic'"),
        ({"model_type": "gpt2"}, "model_type = 'gpt2', fused knows 'llama', 'qwen2'"),
        ({"pretraining_tp": 4}, "pretraining_tp = 4, fused knows 1"),
    ],
)
def test_a_config_that_is_not_carried_out_is_refused_by_its_field(
    engine_of, tiny_llama, change, said
):
    engine = engine_of(tiny_llama, quantization="nf4")
    for name, value in change.items():
        setattr(engine.hf.get_base_model().config, name, value)
    with pytest.raises(ValueError, match=said) as refused:
        fused_of(engine)
    assert "execution.engine=peft" in str(refused.value)


def test_weights_that_are_not_nf4_and_adapters_with_dropout_are_refused(engine_of, tiny_llama):
    with pytest.raises(
        ValueError, match=r"layer 0 self_attn.q_proj is not in NF4: set model.quantization=nf4"
    ):
        fused_of(engine_of(tiny_llama))
    with pytest.raises(ValueError, match=r"lora.dropout = 0.1 is not supported"):
        fused_of(
            engine_of(tiny_llama, quantization="nf4", lora=LoraConfig(r=4, alpha=8, dropout=0.1))
        )


def test_a_model_with_code_of_its_own_is_refused(engine_of, tiny_llama):
    engine = engine_of(tiny_llama, quantization="nf4")
    base = engine.hf.get_base_model()
    base.__class__ = type("Own", (type(base),), {"__module__": "transformers_modules.own"})
    with pytest.raises(ValueError, match=r"brings Python code of its own.*execution.engine=peft"):
        fused_of(engine)


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
