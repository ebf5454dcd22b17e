"""What a probe says of each matrix, against the same worked out in float64 from whole matrices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from glassloop.formula.optim import FlatAdapters, make_optimizer
from glassloop.health import probes
from glassloop.health.probes import first_nonfinite, read_after, read_before, short_name

NAMES = [
    f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{m}.default.weight"
    for i in range(2)
    for m in "AB"
]
SCALING = 2.0


def adapters() -> FlatAdapters:
    torch.manual_seed(0)
    shapes = [(4, 40), (30, 4), (4, 40), (30, 4)]
    found = FlatAdapters(
        zip(NAMES, [nn.Parameter(torch.randn(shape) * 0.1) for shape in shapes], strict=True)
    )
    found.slices[NAMES[1]].of(found.flat.data).zero_()  # a fresh B
    found.grad.normal_()
    return found


def probe(found: FlatAdapters, applied: bool = True, scale: float = 8.0):
    before = read_before(found, scale)
    old = {name: place.of(found.flat.data).double().clone() for name, place in found.slices.items()}
    if applied:
        make_optimizer(
            "adamw", found.flat, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0
        ).step()
        found.slices[NAMES[2]].of(found.flat.data).view(-1)[:40] = (
            old[NAMES[2]].view(-1)[:40].float()
        )  # a quarter does not move
    new = {name: place.of(found.flat.data).double() for name, place in found.slices.items()}
    return (
        read_after(before, found, update=3, applied=applied, scale_of=lambda _: SCALING, attempt=1),
        old,
        new,
    )


def test_norms_ratios_and_shares_are_those_of_each_matrix():
    found = adapters()
    record, old, new = probe(found)
    assert record.matrices == tuple(
        f"layers.{i}.self_attn.q_proj.{m}" for i in range(2) for m in "AB"
    )
    for i, name in enumerate(NAMES):
        step = (new[name] - old[name]).norm().item()
        assert record.grad_norm[i] == pytest.approx(
            found.slices[name].of(found.grad).double().norm().item() / 8.0, rel=1e-6
        )
        assert record.weight_norm[i] == pytest.approx(old[name].norm().item(), rel=1e-6)
        assert record.update_norm[i] == pytest.approx(step, rel=1e-5)
        ratio = record.update_to_weight[i]
        assert (
            ratio is None
            if i == 1
            else ratio == pytest.approx(step / old[name].norm().item(), rel=1e-5)
        )
    assert record.unmoved_share == (0.0, 0.0, 0.25, 0.0)
    assert record.all_unmoved_share == pytest.approx(40 / 560)
    whole = [torch.cat([tree[name].flatten() for name in NAMES]) for tree in (old, new)]
    assert record.all_update_to_weight == pytest.approx(
        ((whole[1] - whole[0]).norm() / whole[0].norm()).item(), rel=1e-5
    )


def test_the_change_of_the_model_is_that_of_the_product():
    record, old, new = probe(adapters())
    assert record.modules == ("layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj")
    for k, (a, b) in enumerate(((NAMES[0], NAMES[1]), (NAMES[2], NAMES[3]))):
        change = SCALING * (new[b] @ new[a] - old[b] @ old[a])
        assert record.delta_norm[k] == pytest.approx(change.norm().item(), rel=1e-4)


@pytest.mark.parametrize(
    "elements", [1, 700, 2**22]
)  # one at a time, two at a time, all of a shape at once
def test_modules_of_several_shapes_keep_their_places(
    elements: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(probes, "ELEMENTS", elements)
    torch.manual_seed(1)
    sizes = {
        "q_proj": (40, 30),
        "k_proj": (40, 10),
        "o_proj": (30, 40),
        "v_proj": (40, 10),
    }  # in, out; rank 4
    shapes = {
        f"base_model.model.model.layers.{i}.self_attn.{module}.lora_{m}.default.weight": (4, a)
        if m == "A"
        else (b, 4)
        for i in range(3)
        for module, (a, b) in sizes.items()
        for m in "AB"
    }
    found = FlatAdapters((name, nn.Parameter(torch.randn(shape))) for name, shape in shapes.items())
    old = {
        short_name(name): place.of(found.flat.data).double() for name, place in found.slices.items()
    }
    before = read_before(found, 1.0)
    found.flat.data.add_(torch.randn_like(found.flat.data) * 0.1)
    new = {
        short_name(name): place.of(found.flat.data).double() for name, place in found.slices.items()
    }
    record = read_after(
        before, found, update=1, applied=True, scale_of=lambda _: SCALING, attempt=1
    )
    assert record.modules == tuple(
        f"layers.{i}.self_attn.{module}" for i in range(3) for module in sizes
    )
    for module, norm in zip(record.modules, record.delta_norm, strict=True):
        a, b = f"{module}.A", f"{module}.B"
        assert norm == pytest.approx(
            SCALING * (new[b] @ new[a] - old[b] @ old[a]).norm().item(), rel=1e-5
        )


def test_a_skipped_update_has_gradients_and_no_step():
    record, _, _ = probe(adapters(), applied=False)
    assert len(record.grad_norm) == 4
    assert (
        record.update_norm,
        record.update_to_weight,
        record.unmoved_share,
        record.delta_norm,
    ) == (None,) * 4
    assert (record.all_update_to_weight, record.all_unmoved_share) == (None, None)


def test_a_bf16_sized_step_is_seen_as_unmoved():
    found = adapters()
    before = read_before(found, 1.0)
    found.flat.data.add_(1e-12)  # far below half an ulp of most entries
    record = read_after(before, found, update=1, applied=True, scale_of=lambda _: 1.0, attempt=1)
    assert record.unmoved_share[0] > 0.9


def test_the_first_matrix_that_is_not_finite_is_named():
    found = adapters()
    assert first_nonfinite(found) is None
    found.slices[NAMES[2]].of(found.flat.data)[0, 0] = float("inf")
    assert first_nonfinite(found) == "layers.1.self_attn.q_proj.A"


def test_names_are_cut_to_what_tells_them_apart():
    assert (
        short_name("base_model.model.model.layers.7.mlp.down_proj.lora_B.default.weight")
        == "layers.7.mlp.down_proj.B"
    )
