"""A pass over chunks of places has the gradient of the whole one."""

from __future__ import annotations

import importlib.util
import random

import pytest
import torch

from glassloop.config import LoraConfig
from glassloop.data.batches import build_pass
from glassloop.data.rows import Row
from glassloop.formula.optim import FlatAdapters
from glassloop.predict.tiers import HOSTS, Tiers

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton, which has no build for this system",
)
ROWS = (9, 17, 5, 30)  # 61 places; the third row has no label


def engine_and_pass(engine_of, model, *, targets=("q_proj", "o_proj", "up_proj", "down_proj"), r=4):
    from glassloop.engines.fused.engine import FusedEngine

    lora = LoraConfig(r=r, alpha=8, targets=targets)
    made = engine_of(model, quantization="nf4", lora=lora)
    engine = FusedEngine(made.hf, made.report)
    adapters = FlatAdapters(engine.hf.named_parameters())
    torch.manual_seed(3)
    adapters.flat.data.copy_(torch.randn_like(adapters.flat) * 0.05)
    drawn = random.Random(0)
    rows = [
        Row(
            f"r{i}",
            tuple(drawn.randrange(5, 500) for _ in range(n)),
            tuple(i != 2 and place > n // 2 for place in range(n)),
        )
        for i, n in enumerate(ROWS)
    ]
    return engine, adapters, rows


def passed(engine, adapters, rows, tiers, *, packed=True):
    engine.use_tiers(tiers)
    adapters.zero_grad()
    p = build_pass(rows, packed=packed, pad_id=0, device=torch.device("cpu"))
    loss_sum, row_loss_sums = engine(p)
    (loss_sum / 7).backward()
    with torch.no_grad():
        again = engine(p)[0].item()  # forward alone
    assert again == pytest.approx(loss_sum.item(), rel=1e-6)
    return loss_sum.item(), row_loss_sums, adapters.grad.clone()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_qwen2"])
def test_every_size_of_chunk_has_the_whole_gradient(engine_of, request, model, packed):
    """One place, odd sizes, ends inside rows, a tail of one, all but one, exactly all."""
    engine, adapters, rows = engine_and_pass(engine_of, request.getfixturevalue(model))
    places = sum(ROWS) if packed else len(ROWS) * max(ROWS)
    whole = passed(engine, adapters, rows, Tiers(1), packed=packed)
    for chunk in (1, 7, 13, places // 2, places - 1, places, places + 1):
        found = passed(engine, adapters, rows, Tiers(0, chunk=chunk), packed=packed)
        assert found[0] == pytest.approx(whole[0], rel=1e-6)
        assert torch.allclose(found[1], whole[1], rtol=1e-5)
        off = float((found[2] - whole[2]).norm() / whole[2].norm())
        assert off <= 1e-6, (chunk, off)
        if chunk >= places:  # a pass that is no longer takes the path of every short one
            assert torch.equal(found[2], passed(engine, adapters, rows, Tiers(0), packed=packed)[2])


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("down_proj",), ("gate_proj", "o_proj")])
def test_groups_without_adapters_pass_the_gradient_on(engine_of, tiny_llama, targets):
    engine, adapters, rows = engine_and_pass(engine_of, tiny_llama, targets=targets)
    whole = passed(engine, adapters, rows, Tiers(1))[2]
    for host in HOSTS:
        found = passed(engine, adapters, rows, Tiers(0, host, chunk=8))[2]
        assert float((found - whole).norm() / whole.norm()) <= 1e-6


def test_where_large_tensors_wait_changes_no_bit(engine_of, tiny_llama):
    engine, adapters, rows = engine_and_pass(engine_of, tiny_llama)
    grads = [
        passed(engine, adapters, rows, Tiers(0, host, held, chunk=11))[2]
        for host in HOSTS
        for held in (0, 2)
    ]
    assert grads[0].any() and all(torch.equal(grads[0], one) for one in grads[1:])


def test_a_pass_adds_to_the_gradient_of_the_one_before(engine_of, tiny_llama):
    """Sums over chunks begin anew in each layer and pass."""
    engine, adapters, rows = engine_and_pass(engine_of, tiny_llama)
    one = passed(engine, adapters, rows, Tiers(0, chunk=10))[2]
    p = build_pass(rows, packed=True, pad_id=0, device=torch.device("cpu"))
    (engine(p)[0] / 7).backward()
    assert torch.allclose(adapters.grad, 2 * one, rtol=1e-5, atol=1e-9)


def test_a_layer_that_is_kept_has_no_chunks():
    with pytest.raises(AssertionError, match="kept"):
        Tiers(1, chunk=8)


@pytest.mark.parametrize(("heads", "key_heads"), [(8, 2), (4, 4), (24, 12), (3, 1)])
def test_groups_of_heads_have_the_gradient_of_all(heads, key_heads):
    from glassloop.engines.fused.attention import Bounds, attention, attention_backward
    from glassloop.engines.fused.attention_groups import backward_by_groups, forward_by_groups
    from glassloop.engines.fused.rotary import angles

    torch.manual_seed(0)
    lengths, size = (7, 1, 12), 16
    count = sum(lengths)
    qkv = torch.randn(count, (heads + 2 * key_heads) * size)
    q, k, v = (
        t.unflatten(1, (-1, size))
        for t in qkv.split([heads * size, key_heads * size, key_heads * size], dim=1)
    )
    bounds = Bounds.of(lengths, torch.device("cpu"), torch.float32, size)
    by = angles(torch.arange(count), torch.rand(size // 2), 1.0)
    kept, grad = attention(q, k, v, bounds), torch.randn(count, heads, size)
    whole = attention_backward(grad, q, k, v, kept, bounds, by, room=5)
    apart = forward_by_groups(q, k, v, bounds)
    assert torch.allclose(apart.out, kept.out, rtol=1e-5, atol=1e-6)
    for chunk in (0, 1, 6, count):
        found = backward_by_groups(grad, q, k, v, apart, bounds, by, room=5, chunk=chunk)
        assert found.shape == whole.shape
        assert torch.allclose(found[:, :-5], whole[:, :-5], rtol=1e-5, atol=1e-6)


def test_no_kernel_of_a_long_pass_sees_a_tensor_that_is_not_its_own(monkeypatch):
    """A group's tensors have no gaps: their offsets stay below what all heads would need."""
    from glassloop.engines.fused import attention_groups as groups
    from glassloop.engines.fused.attention import Bounds
    from glassloop.engines.fused.rotary import angles

    seen, forward, backward = [], groups.attention, groups.gradients

    def noted(function):
        def call(*args):
            tensors = [t for t in args if isinstance(t, torch.Tensor)]
            tensors += [t.out for t in args if hasattr(t, "out")]
            seen.extend(t.untyped_storage().nbytes() // 4 for t in tensors)
            return function(*args)

        return call

    monkeypatch.setattr(groups, "attention", noted(forward))
    monkeypatch.setattr(groups, "gradients", noted(backward))
    heads, key_heads, size, count = 16, 8, 4, 10
    qkv = torch.randn(count, (heads + 2 * key_heads) * size)
    q, k, v = (t.unflatten(1, (-1, size)) for t in qkv.split([64, 32, 32], dim=1))
    bounds = Bounds.of((count,), torch.device("cpu"), torch.float32, size)
    kept = groups.forward_by_groups(q, k, v, bounds)
    by = angles(torch.arange(count), torch.rand(size // 2), 1.0)
    groups.backward_by_groups(torch.randn(q.shape), q, k, v, kept, bounds, by)
    assert len(seen) == 8 * (3 + 5) and max(seen) == count * 2 * size
