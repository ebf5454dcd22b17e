"""GPU optimizer states and random numbers come back byte for byte.

Paged states too.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import safetensors.torch
import torch

from glassloop.formula.optim import make_optimizer
from glassloop.saved import state as snapshots

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ELEMENTS = 1172 * 256  # above the 100,000 from which bitsandbytes pages


def optimizer_over(name: str, flat: torch.nn.Parameter) -> Any:
    return make_optimizer(name, flat, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)


def update(flat: torch.nn.Parameter, optimizer: Any, count: int) -> None:
    for _ in range(count):
        flat.grad = torch.randn_like(flat)
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit", "adamw", "sgd"])
def test_a_restored_optimizer_goes_on_byte_for_byte(name: str) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(1)
    flat = torch.nn.Parameter(torch.randn(ELEMENTS, device=device))
    optimizer = optimizer_over(name, flat)
    update(flat, optimizer, 3)
    tensors, plain = snapshots.optimizer_state(optimizer, flat)
    data, text = safetensors.torch.save(tensors), json.dumps(plain)
    rng = json.loads(json.dumps(snapshots.rng_state(device)))
    again = torch.nn.Parameter(flat.detach().clone())
    update(flat, optimizer, 3)

    fresh = optimizer_over(name, again)  # has not stepped: it has no state of its own yet
    built = snapshots.built_optimizer_state(
        fresh, again, safetensors.torch.load(data), json.loads(text)
    )
    snapshots.set_optimizer_state(fresh, again, built)
    restored, _ = snapshots.optimizer_state(fresh, again)
    assert restored.keys() == tensors.keys()
    assert all(
        torch.equal(
            restored[key].view(-1).view(torch.uint8), tensors[key].view(-1).view(torch.uint8)
        )
        for key in tensors
    )
    snapshots.restore_rng(rng, device)
    update(again, fresh, 3)
    assert torch.equal(again, flat)
    after, expected = (
        snapshots.optimizer_state(fresh, again)[0],
        snapshots.optimizer_state(optimizer, flat)[0],
    )
    assert all(torch.equal(after[key], expected[key]) for key in expected)
    for key, value in optimizer.state[flat].items():
        if isinstance(value, torch.Tensor):
            assert fresh.state[again][key].device == value.device
            assert getattr(fresh.state[again][key], "is_paged", False) == getattr(
                value, "is_paged", False
            )
    if name == "paged_adamw_8bit":
        assert fresh.state[again]["state1"].is_paged


def test_random_numbers_of_another_kind_of_device_are_refused() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    cpu = torch.device("cpu")
    for saved, present in ((cpu, device), (device, cpu)):
        with pytest.raises(
            ValueError, match=f"a run on {saved.type}, this rank runs on {present.type}"
        ):
            snapshots.restore_rng(snapshots.rng_state(saved), present)
