"""The flat buffer, its optimizers, the norm and fp16's scale."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from glassloop.formula import optim
from glassloop.formula.optim import (
    ALIGNMENT,
    FlatAdapters,
    LossScale,
    b_lr_of,
    l2_norm,
    make_optimizer,
    state_tensors,
)
from glassloop.predict.terms import SUM_PIECE

HYPER = dict(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)


def layers(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(96, 70, bias=False), nn.Linear(70, 96, bias=False))


def test_parameters_and_gradients_are_views_and_values_stay():
    model, same = layers(), layers()
    adapters = FlatAdapters(model.named_parameters())
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True)
    )
    assert adapters.trainable == 2 * 96 * 70
    assert all(s.offset % ALIGNMENT == 0 for s in adapters.slices.values())
    model(torch.ones(3, 96)).sum().backward()
    model(torch.ones(3, 96)).sum().backward()
    same(torch.ones(3, 96)).sum().backward()
    for name, p in same.named_parameters():
        torch.testing.assert_close(adapters.slices[name].of(adapters.grad), 2 * p.grad)
    adapters.check_views()


def test_a_dropped_gradient_view_is_noticed():
    model = layers()
    adapters = FlatAdapters(model.named_parameters())
    model.zero_grad()
    with pytest.raises(RuntimeError, match=r"0\.weight left the flat buffer"):
        adapters.check_views()


def test_a_bf16_adapter_is_refused():
    with pytest.raises(ValueError, match="bfloat16"):
        FlatAdapters(layers().bfloat16().named_parameters())


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw", "sgd"])
def test_one_flat_tensor_moves_as_the_tensors_would_one_by_one(name):
    """Bitwise for 8 bits: blocks of 256 never straddle two matrices, so quantisation of the states
    is the same."""
    model, single = layers(), layers()
    adapters = FlatAdapters(model.named_parameters())
    optimizer = make_optimizer(name, adapters.flat, **HYPER)
    ps = list(single.parameters())
    betas = (HYPER["beta1"], HYPER["beta2"])
    one_by_one = {
        "adamw_8bit": lambda: bnb.optim.AdamW8bit(
            ps, lr=1e-2, betas=betas, eps=1e-8, weight_decay=0.01
        ),
        "adamw": lambda: torch.optim.AdamW(
            ps, lr=1e-2, betas=betas, eps=1e-8, weight_decay=0.01, fused=True
        ),
        "sgd": lambda: torch.optim.SGD(ps, lr=1e-2, weight_decay=0.01),
    }[name]()
    for step in range(4):
        torch.manual_seed(step)
        x = torch.randn(5, 96)
        adapters.zero_grad()
        one_by_one.zero_grad()
        for m in (model, single):
            (m(x) ** 2).mean().backward()
        optimizer.step()
        one_by_one.step()
    for a, b in zip(model.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7 if name == "adamw_8bit" else 0)


def test_the_norm_of_a_large_vector_is_exact_to_1e_7():
    flat = torch.randn(5_000_000, generator=torch.Generator().manual_seed(1))
    exact = flat.double().square().sum().sqrt().item()
    assert l2_norm(flat).item() == pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize("piece", [1, 7, 64, 999, 1000, 1001])
def test_norm_and_checksum_do_not_depend_on_their_pieces(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    exact, bits = flat.double().norm().item(), int(flat.view(torch.int32).long().sum())
    monkeypatch.setattr(optim, "PIECE", piece)
    assert l2_norm(flat).item() == pytest.approx(exact, rel=1e-14)
    assert int(optim.bit_sum(flat)) == bits
    assert int(optim.bit_sum(flat[:0])) == 0


def test_the_ledger_counts_the_same_pieces() -> None:
    assert SUM_PIECE == optim.PIECE


@pytest.mark.parametrize("name", ["sgd", "adamw", "adamw_8bit"])
def test_the_checksum_sees_one_changed_bit_of_any_tensor_that_replicas_share(name):
    adapters = FlatAdapters(layers().named_parameters())
    optimizer = make_optimizer(
        name, adapters.flat, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0
    )
    adapters.grad.normal_(generator=torch.Generator().manual_seed(2))
    optimizer.step()
    before = adapters.checksum(optimizer).item()
    assert 0 <= before < 2**48
    tensors = [
        adapters.flat.data,
        *(tensor for _, tensor in state_tensors(optimizer, adapters.flat)),
    ]
    assert len(tensors) == {"sgd": 1, "adamw": 4, "adamw_8bit": 7}[name]
    for tensor in tensors:
        bits = tensor.reshape(-1).view(torch.uint8)
        bits[-1] ^= 1
        assert adapters.checksum(optimizer).item() != before
        bits[-1] ^= 1
        assert adapters.checksum(optimizer).item() == before


def test_the_checksum_sees_two_moments_exchanged():
    adapters = FlatAdapters(layers().named_parameters())
    optimizer = make_optimizer(
        "adamw", adapters.flat, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0
    )
    adapters.grad.fill_(1.0)
    optimizer.step()
    before = adapters.checksum(optimizer).item()
    moments = optimizer.state[adapters.flat]
    moments["exp_avg"], moments["exp_avg_sq"] = moments["exp_avg_sq"], moments["exp_avg"]
    assert adapters.checksum(optimizer).item() != before


def test_parts_name_every_matrix_and_its_optimizer_state_block_by_block():
    adapters = FlatAdapters(layers().named_parameters())
    optimizer = make_optimizer(
        "adamw_8bit", adapters.flat, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0
    )
    adapters.grad.fill_(1.0)
    optimizer.step()
    parts = dict(adapters.parts(optimizer))
    for name, place in adapters.slices.items():
        assert parts[name].data_ptr() == place.of(adapters.flat.data).data_ptr()
        assert parts[f"state1 of {name}"].numel() == place.size
        assert parts[f"absmax1 of {name}"].numel() == -(-place.size // 256)
    assert not any(part.startswith("qmap") for part in parts)


def test_the_loss_scale_halves_on_overflow_and_doubles_after_a_quiet_while():
    scale = LossScale(1024.0, growth_updates=3, enabled=True)
    scale.after(finite=False)
    assert scale.value == 512
    for _ in range(3):
        scale.after(finite=True)
    assert scale.value == 1024
    off = LossScale(1024.0, 3, enabled=False)
    off.after(finite=False)
    assert off.value == 1


def test_paged_states_on_a_cpu_are_refused():
    with pytest.raises(ValueError, match="paged_adamw_8bit needs a CUDA device"):
        make_optimizer("paged_adamw_8bit", FlatAdapters(layers().named_parameters()).flat, **HYPER)


class Pair(nn.Module):
    """Two matrices under the names that PEFT gives A and B."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.ModuleDict(
            {name: nn.ModuleDict({"default": nn.Linear(32, 16)}) for name in ("lora_A", "lora_B")}
        )


@pytest.mark.parametrize("name", ["adamw", "sgd", "adamw_8bit"])
def test_b_learns_at_its_own_rate_as_in_a_group_of_its_own(name: str) -> None:
    """Against two optimizers, each with one of the rates, that see the same gradients."""
    model, other = Pair(), Pair()
    adapters = FlatAdapters(model.named_parameters())
    one = make_optimizer(name, adapters.flat, **HYPER | {"lr": 1e-3}, b_lr_ratio=16.0)
    twin = FlatAdapters(other.named_parameters())
    fast = FlatAdapters(Pair().named_parameters())
    both = [
        (make_optimizer(name, flat.flat, **HYPER | {"lr": lr}), flat)
        for flat, lr in ((twin, 1e-3), (fast, 16e-3))
    ]
    drawn = torch.Generator().manual_seed(1)
    for _ in range(4):
        slope = torch.randn(len(adapters.grad), generator=drawn)
        for flat in (adapters, twin, fast):
            flat.grad.copy_(slope)
        optim.step(one, adapters)
        for optimizer, _ in both:
            optimizer.step()
        for key, place in adapters.slices.items():
            wanted = (fast if ".lora_B." in key else twin).flat.data
            assert torch.allclose(place.of(adapters.flat.data), place.of(wanted), atol=2e-7), key
    assert b_lr_of(one) == pytest.approx(16e-3) and b_lr_of(both[0][0]) is None
