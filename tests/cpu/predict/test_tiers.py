"""Memory of `fused`: live bytes, tiers, measurements, pass sizes."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from phases import check_phases, fused_of, row_of
from torch.utils.flop_counter import FlopCounterMode

from glassloop.config import PROJECTIONS, LoraConfig
from glassloop.data.batches import build_pass
from glassloop.formula.optim import FlatAdapters
from glassloop.predict import tiers as predicted
from glassloop.predict.cards import budget_bytes, needed_gib, verdict
from glassloop.predict.flops import flops_of
from glassloop.predict.hardware import gpu_named
from glassloop.predict.ledger import ledger_of
from glassloop.predict.shapes import KNOWN, shapes_of
from glassloop.predict.spend import pass_tokens_of, resident_bytes, with_tiers
from glassloop.predict.terms import GIB, Work
from glassloop.predict.tiers import HOSTS, Tiers, sizes_of

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton, which has no build for this system",
)
R1 = KNOWN["deepseek-ai/DeepSeek-R1-Distill-Llama-8B"]
WORK = Work(rows=2, tokens=2048, r=16, targets=PROJECTIONS)


# --- one source


@needs_triton
@pytest.mark.parametrize(
    "targets", [PROJECTIONS, ("q_proj", "v_proj"), ("o_proj", "up_proj", "down_proj")]
)
@pytest.mark.parametrize("r", [4, 16, 24])
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen2"])
def test_the_engine_counts_a_layer_as_the_plan_does(engine_of, request, family, targets, r):
    model = request.getfixturevalue(family)
    engine = fused_of(engine_of(model, quantization="nf4", lora=LoraConfig(r=r, targets=targets)))
    shapes, _ = shapes_of(str(model))
    assert shapes is not None
    one, layer = sizes_of(shapes, r, targets, element=4), engine.layers[0]
    assert layer.sizes == one
    assert predicted.shadow_bytes(one) == sum(
        linear.a.nbytes + linear.b.nbytes for linear in layer.linears
    )
    adapters = FlatAdapters(engine.hf.named_parameters())
    loss_sum, _ = engine(
        build_pass([row_of(9, 4, "r")], packed=False, pad_id=0, device=torch.device("cpu"))
    )
    loss_sum.backward()
    assert adapters.grad.any()
    assert predicted.scratch_bytes(one) == sum(
        matrix.nbytes for matrix in engine.scratch.matrices.values()
    )
    made = {
        shape: sum(t.nbytes for t in pair)
        for shape, pair in engine.scratch.sums.items()
        if shape[0]
    }
    assert predicted.product_bytes(one) == sum(made.values())


# --- bytes


@needs_triton
@pytest.mark.parametrize(
    "chosen",
    [
        Tiers(4),
        Tiers(2),
        Tiers(0),
        Tiers(4, held=4),
        *(Tiers(kept, host) for kept in (0, 1) for host in HOSTS[1:]),
        *(Tiers(0, host, chunk=256) for host in HOSTS),
    ],
    ids=str,
)
def test_each_phase_is_predicted_from_shapes_as_its_bytes_live(wide_llama, engine_of, chosen):
    check_phases(wide_llama, engine_of, chosen)


def test_the_peaks_that_an_h100_measured_are_predicted():
    """8B shapes, drawn weights, r = 16, 80 % supervised.

    The process held 1.94 GiB beside: eleven copies of the flat buffer, of one layer the NF4 weights
    twice and once a dequantised one; and the embedding had not yet learned to wait on the host.
    """
    held = (
        11 * 4 * 41_943_040
        + 2 * 4096 * 14352
        + 0.5159 * 218_103_808
        + predicted.shadow_bytes(sizes_of(R1, 16, PROJECTIONS, 2))
    ) / GIB
    assert held == pytest.approx(1.94, abs=0.01)
    embedding = R1.embedding_weights * 2 / GIB
    measured = (
        (2, 2048, 3276, Tiers(32, "nothing"), 20.18),
        (2, 2048, 3276, Tiers(0, "nothing"), 9.93),
        (2, 2048, 3276, Tiers(0, "all"), 8.99 - embedding),
        (1, 6787, 5430, Tiers(32, "nothing"), 28.05),
        (1, 6787, 5430, Tiers(0, "nothing"), 11.07),
        (1, 16384, 13104, Tiers(32, "nothing"), 55.88),
    )
    for rows, tokens, supervised, chosen, gib in measured:
        work = replace(WORK, rows=rows, tokens=tokens, supervised_tokens=supervised, tiers=chosen)
        assert ledger_of(R1, work, "fused").peak_bytes / GIB == pytest.approx(
            gib - held, rel=0.02
        ), (rows, tokens, chosen)


def test_the_performance_page_says_what_is_predicted():
    """Its table has rows of a pass, tokens, supervised, layers kept."""
    page = Path(__file__).resolve().parents[3] / "docs" / "performance.md"
    text = page.read_text(encoding="utf-8")
    table = text[text.index("| an update | layers kept |") :].split("\n\n")[0].splitlines()[2:]
    said = [float(line.split("|")[-2]) for line in table]
    cells = [
        (2, 2048, 3276, 32),
        (2, 2048, 3276, 0),
        (1, 16384, 13104, 32),
        (1, 6787, 5430, 32),
        (1, 6787, 5430, 0),
    ]
    works = [
        replace(WORK, rows=b, tokens=t, supervised_tokens=s, tiers=Tiers(k, "nothing"))
        for b, t, s, k in cells
    ]
    assert said == [
        pytest.approx(ledger_of(R1, work, "fused").peak_bytes / GIB, abs=0.06) for work in works
    ]


@given(tokens=st.integers(1, 20_000), kept=st.integers(0, 31), r=st.sampled_from([8, 16, 32]))
def test_more_work_never_needs_less(tokens, kept, r):
    work = replace(WORK, rows=1, tokens=tokens, r=r, tiers=Tiers(kept, "nothing"))
    peak = ledger_of(R1, work, "fused").peak_bytes
    for more in (dict(tokens=tokens + 16), dict(r=2 * r), dict(tiers=Tiers(kept + 1, "nothing"))):
        assert ledger_of(R1, replace(work, **more), "fused").peak_bytes >= peak
    assert ledger_of(R1, replace(work, tiers=Tiers(0, "all")), "fused").peak_bytes <= peak


# --- cards and passes


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("card", ["3090", "4090", "A100-40", "H100"])
def test_what_is_chosen_for_a_card_fits_it(card, ranks):
    gpu = gpu_named(card)
    assert gpu is not None
    for work in (
        WORK,
        replace(WORK, rows=8),
        replace(WORK, rows=1, packed=True, between=(2048, 16384)),
    ):
        one = verdict(gpu, R1, work, ranks=ranks, rows_per_update=16, engine="fused")
        assert one.fits and one.needed_gib <= one.has_gib
        assert one.tiers.startswith(f"{one.kept} of 32 layers kept")
        least = verdict(
            gpu, R1, replace(work, profile="min"), ranks=ranks, rows_per_update=16, engine="fused"
        )
        assert least.needed_gib < 0.75 * one.needed_gib
        much = verdict(
            gpu, R1, replace(work, profile=900.0), ranks=ranks, rows_per_update=16, engine="fused"
        )
        assert (much.kept, much.faster) == (one.kept, None)  # fill would keep no more
        assert (least.kept, least.faster) == (
            1,
            f"memory.profile=fill, {one.kept} of 32 layers kept",
        )


def test_on_24_gb_full_rows_keep_every_layer_and_a_small_budget_keeps_few():
    gpu = gpu_named("4090")
    assert gpu is not None
    assert verdict(gpu, R1, WORK, ranks=2, rows_per_update=16, engine="fused").kept == 32
    tight = verdict(
        gpu, R1, replace(WORK, profile=12.0), ranks=2, rows_per_update=16, engine="fused"
    )
    assert 5 < (tight.kept or 0) < 15
    assert tight.needed_gib < 12.8
    none = verdict(gpu, R1, WORK, ranks=2, rows_per_update=16, free_gib=3.0, engine="fused")
    assert not none.fits and none.cure is None
    wide = verdict(
        gpu,
        R1,
        replace(WORK, rows=16, host_gib=0.0),
        ranks=1,
        rows_per_update=16,
        free_gib=12.0,
        engine="fused",
    )
    assert not wide.fits and wide.cure is not None and "batch.rows_per_update=16" in wide.cure
    stored = verdict(
        gpu,
        R1,
        replace(WORK, rows=4, checkpointing=False),
        ranks=1,
        rows_per_update=16,
        engine="fused",
    )
    assert not stored.fits and stored.cure == "execution.checkpointing=true"


@given(gib=st.floats(5, 90), r=st.sampled_from([8, 16, 64]))
def test_a_chosen_pass_is_the_largest_that_every_layer_can_keep(gib, r):
    work, budget = replace(WORK, r=r, packed=True), int(gib * GIB)
    tokens = pass_tokens_of(R1, work, budget)
    assert tokens % predicted.PASS_STEP == 0 and tokens <= predicted.MOST_PASS_TOKENS

    def kept(count: int) -> int:
        chosen = with_tiers(R1, replace(work, rows=1, tokens=count), budget).tiers
        assert chosen is not None
        return chosen.kept

    if tokens:
        assert kept(tokens) == 32
    if tokens < predicted.MOST_PASS_TOKENS:
        assert kept(tokens + predicted.PASS_STEP) < 32
    assert pass_tokens_of(R1, work, budget + GIB) >= tokens


def test_a_pass_is_no_larger_than_a_ranks_share_and_no_smaller_than_the_longest_row():
    work, budget = replace(WORK, rows=1, packed=True, supervised_tokens=1024), budget_bytes(23.5, 1)
    assert with_tiers(R1, replace(work, between=(512, 3000)), budget).tokens == 3000
    chosen = with_tiers(R1, replace(work, between=(512, 90_000)), budget)
    assert 4096 < chosen.tokens < 6144 and chosen.supervised_tokens == chosen.tokens // 2
    small = with_tiers(R1, replace(work, between=(2048, 90_000)), 9 * GIB)
    assert small.tokens == 2048 and small.tiers is not None and small.tiers.kept < 32
    assert resident_bytes(R1, work) < 6.5 * GIB < needed_gib(R1, chosen, 1, "fused") * GIB


# --- arithmetic


def test_groups_of_one_shape_share_neither_weights_nor_gradients():
    """An MLP as wide as the model: o_proj has down_proj's shape."""
    one = sizes_of(replace(R1, intermediate=4096), 16, PROJECTIONS, element=2)
    assert one.o == one.down
    apart = [
        predicted.scratch_bytes(replace(one, down=group))
        for group in (one.down, predicted.Group(4096, 4096, 32))
    ]
    assert apart[1] - apart[0] == 2 * (4128 * 4128 - 4112 * 4112)
    more = replace(one, down=predicted.Group(4096, 4096, 32))
    assert predicted.product_bytes(more) - predicted.product_bytes(one) == 4 * (32 - 16) * 8192


@needs_triton
@pytest.mark.parametrize("host", HOSTS)
def test_what_a_recomputed_layer_computes_again_leaves_down_proj_out(engine_of, wide_llama, host):
    """And attention with o_proj, where the host has what they came to."""
    targets = ("o_proj",)  # a group of one member: nothing of the folded product is zeros
    engine = fused_of(
        engine_of(wide_llama, quantization="nf4", lora=LoraConfig(r=16, targets=targets))
    )
    FlatAdapters(engine.hf.named_parameters())
    shapes, _ = shapes_of(str(wide_llama))
    assert shapes is not None
    p = build_pass([row_of(64, 20, "r")], packed=True, pad_id=0, device=torch.device("cpu"))

    def products(kept: int) -> int:
        engine.use_tiers(type(engine.tiers)(kept, host))
        with FlopCounterMode(display=False) as counter:
            engine(p)[0].backward()
        return counter.get_flop_counts()["Global"][torch.ops.aten.mm]

    for kept in (0, 3):
        counted = flops_of(
            shapes, [(64, 20)], r=16, targets=targets, checkpointing=True, kept=kept, host=host
        )
        attention = (
            0
            if host in ("attention", "all")
            else shapes.layers * 2 * 2 * (64 * 65 // 2) * shapes.q_width * (4 - kept) / 4
        )
        assert products(kept) - products(4) == pytest.approx(
            counted.recompute - attention, rel=1e-6
        ), kept
    assert (
        flops_of(
            shapes, [(64, 20)], r=16, targets=targets, checkpointing=True, kept=4, host=host
        ).recompute
        == 0
    )
