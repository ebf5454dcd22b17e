"""The fused engine's Triton kernels under Triton's interpreter.

On a CPU, held to fp64 truth or, where bits are promised, to bitsandbytes.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import INTERPRETED, MARKS, as_stored, kernels, off, strided

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton, which has no build for this system",
)


@pytest.mark.skipif(INTERPRETED, reason="this is the process that the test below starts")
def test_kernels_under_the_interpreter(request):
    """In its own process: Triton decides when a kernel is defined.

    It runs what its own session runs, by mark.
    """
    files = sorted(map(str, Path(__file__).parent.glob("test_fused_kernels*.py")))
    words = ["-q", "-p", "no:cacheprovider", "-o", "addopts="]
    words += ["-m", request.config.getoption("markexpr")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, *files],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "failed" not in done.stdout


def packed_of(shapes: list[tuple[int, int]], *, nested: bool):
    import bitsandbytes as bnb

    from glassloop.engines.fused.dequant import pack

    torch.manual_seed(1)
    modules = []
    for rows, columns in shapes:
        module = bnb.nn.Linear4bit(
            columns,
            rows,
            bias=False,
            compute_dtype=torch.float32,
            compress_statistics=nested,
            quant_type="nf4",
        )
        module.weight = bnb.nn.Params4bit(
            torch.randn(rows, columns) * 0.05,
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=nested,
        )
        modules.append(module.to("cpu"))
    before = [
        bnb.functional.dequantize_4bit(m.weight.data.clone(), m.weight.quant_state).clone()
        for m in modules
    ]
    return pack(modules, [f"weight {i}" for i in range(len(shapes))]), modules, before


SHAPES = [
    [(64, 64)],
    pytest.param([(96, 128), (32, 128), (32, 128)], marks=pytest.mark.thorough),
    [(24, 4160), (8, 4160)],
]


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_weights_come_out_with_bitsandbytes_bits(shapes, nested, dtype):
    """The reference always, the kernel where it can run.

    With adapters beside and below, into a matrix with wider rows.
    """
    import bitsandbytes as bnb

    from glassloop.engines.fused.dequant import dequantise_reference, dequantise_triton

    packed, modules, before = packed_of(shapes, nested=nested)
    rows, columns = sum(packed.rows), packed.columns
    for one in (dequantise_reference, *((dequantise_triton,) if INTERPRETED else ())):
        truth = as_stored(torch.cat(before), dtype, by_kernel=one is dequantise_triton)
        right, below = torch.randn(rows, 16).to(dtype), torch.randn(16, columns).to(dtype)
        wide = torch.full((rows + 17, columns + 24), 7.0, dtype=dtype)
        one(packed, right, below, wide[: rows + 16, : columns + 16])
        assert torch.equal(wide[:rows, :columns], truth), one.__name__
        assert torch.equal(wide[:rows, columns : columns + 16], right) and torch.equal(
            wide[rows : rows + 16, :columns], below
        )
        assert bool(
            (wide[rows:, columns:] == 7).all()
            and (wide[:, columns + 16 :] == 7).all()
            and (wide[-1] == 7).all()
        )  # no more
        one(
            packed, right[:, :0], below[:0], alone := torch.zeros(rows, columns, dtype=dtype)
        )  # without adapters
        assert torch.equal(alone, truth)
    after = [bnb.functional.dequantize_4bit(m.weight.data, m.weight.quant_state) for m in modules]
    assert all(
        torch.equal(a, b) for a, b in zip(after, before, strict=True)
    )  # the modules kept their values
    assert all(
        m.weight.data.untyped_storage().data_ptr() == packed.codes.untyped_storage().data_ptr()
        for m in modules
    )  # and no copy


def test_small_adapters_count_in_bf16():
    """After a first update B holds the learning rate.

    Folded in, the adapters' share is added before the sum is rounded. As a product of its own, as
    other engines have it, it is added to one that is rounded already, and is lost if it is less
    than half of the last place.
    """
    from glassloop.engines.fused.linear import Adapter, Linear, Scratch

    packed, _, (weight,) = packed_of([(256, 512)], nested=True)
    a, b = (
        torch.nn.Parameter(torch.randn(16, 512) / 512**0.5),
        torch.nn.Parameter(torch.zeros(256, 16)),
    )
    linear = Linear("o", packed, (Adapter(a, b, 1.0),), torch.bfloat16)
    x = torch.randn(64, 512).bfloat16()
    effect: dict[str, list[torch.Tensor]] = {"folded": [], "apart": []}
    for size in (0.0, 2e-4):
        with torch.no_grad():
            b.copy_(
                torch.full_like(b, size)
                * torch.where(torch.rand(b.shape, generator=torch.manual_seed(2)) < 0.5, 1, -1)
            )
            linear.a.copy_(a), linear.b.copy_(b)
            seen = linear.input(len(x))
            seen[:, :512].copy_(x)
            effect["folded"].append(linear.forward(seen, Scratch().weights(linear)).double())
            effect["apart"].append(
                (x @ weight.bfloat16().t() + x @ a.bfloat16().t() @ b.bfloat16().t()).double()
            )
    exact = (x.double() @ a.bfloat16().double().t()) @ b.bfloat16().double().t()
    kept = {
        name: float(((after - before) * exact).sum() / exact.square().sum())
        for name, (before, after) in effect.items()
    }
    assert kept["folded"] == pytest.approx(1, abs=0.1) and kept["apart"] < 0.6, kept


@pytest.mark.parametrize("dtype", list(MARKS))
@pytest.mark.parametrize("width", [64, 96])
@pytest.mark.parametrize("add", [True, False])
def test_norm_forward_and_backward(dtype, width, add):
    torch.manual_seed(0)
    x, y, grad, residual = (torch.randn(5, width).to(dtype) for _ in range(4))
    weight = (torch.rand(width) + 0.5).to(dtype)
    s = (x.double() + y.double() if add else x.double()).requires_grad_()
    truth = s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()
    (slope,) = torch.autograd.grad(truth, s, grad.double())
    for forward, backward in zip(
        kernels("norm.add_norm"), kernels("norm.norm_backward"), strict=True
    ):
        out = strided(5, width, dtype)
        total = forward(x, y if add else None, weight, 1e-5, out[:, :width])
        by_kernel = forward.__name__.endswith("triton")
        assert torch.equal(
            total, as_stored(x.float() + y.float(), dtype, by_kernel=by_kernel) if add else x
        )
        assert off(out[:, :width], truth.detach()) < MARKS[dtype] and not out[:, width:].any()
        into = strided(5, width, dtype)
        into[:, :width] = residual
        backward(grad, total, weight, 1e-5, into[:, :width])
        assert (
            off(into[:, :width], residual.double() + slope) < MARKS[dtype]
            and not into[:, width:].any()
        )


@pytest.mark.parametrize("dtype", list(MARKS))
@pytest.mark.parametrize(("heads", "size"), [(3, 16), (6, 24)])
def test_rotation_and_back(dtype, heads, size):
    """The kernel's rotation is transformers'; turned back it is what it was."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    from glassloop.engines.fused.rotary import angles

    torch.manual_seed(0)
    positions, frequencies = torch.tensor([0, 1, 2, 0, 1, 700]), torch.rand(size // 2)
    by = angles(positions, frequencies, 1.0)
    x = torch.randn(6, heads * size).to(dtype)
    q = x.double().view(1, 6, heads, size).transpose(1, 2)
    wide = [torch.cat([t, t], dim=1).double().unsqueeze(0) for t in (by.cos, by.sin)]
    truth = apply_rotary_pos_emb(q, q, *wide)[0].transpose(1, 2).reshape(6, -1)
    for rotate in kernels("rotary.rotate"):
        out = strided(6, heads * size, dtype)
        rotate(x, by, out[:, : heads * size])
        assert (
            off(out[:, : heads * size], truth) < MARKS[dtype] and not out[:, heads * size :].any()
        )
        rotate(out[:, : heads * size], by, out[:, : heads * size], back=True)  # in place
        assert off(out[:, : heads * size], x.double()) < 2 * MARKS[dtype]


@pytest.mark.parametrize("dtype", list(MARKS))
@pytest.mark.parametrize("width", [48, 1040])
def test_the_gate_forward_and_backward(dtype, width):
    torch.manual_seed(0)
    gate_up, grad = (3 * torch.randn(4, 2 * width)).to(dtype), torch.randn(4, width).to(dtype)
    both = gate_up.double().requires_grad_()
    truth = torch.nn.functional.silu(both[:, :width]) * both[:, width:]
    (slope,) = torch.autograd.grad(truth, both, grad.double())
    for forward, backward in zip(
        kernels("swiglu.swiglu"), kernels("swiglu.swiglu_backward"), strict=True
    ):
        out, place, down = strided(4, width, dtype), strided(4, 2 * width, dtype), grad.clone()
        forward(gate_up, out[:, :width])
        assert off(out[:, :width], truth.detach()) < MARKS[dtype] and not out[:, width:].any()
        place[:, : 2 * width] = gate_up
        backward(down, place[:, : 2 * width])
        assert off(place[:, : 2 * width], slope) < MARKS[dtype] and not place[:, 2 * width :].any()
        assert off(down, truth.detach()) < MARKS[dtype]


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("kinds", [(torch.float32, torch.bfloat16), (torch.float32, torch.float32)])
def test_matrices_move_to_their_places(add, kinds):
    from glassloop.engines.fused.matrices import Move, Moves

    torch.manual_seed(0)
    for by_kernel in (False, *((True,) if INTERPRETED else ())):
        targets = [torch.ones(5, 40, dtype=kinds[1]), torch.ones(300, 24, dtype=kinds[1])]
        sources = [torch.randn(5, 8).to(kinds[0]), torch.randn(300, 16).to(kinds[0])]
        moves = Moves(
            [Move(sources[0], targets[0][:, 8:16], 0.5), Move(sources[1], targets[1][:, :16])]
        )
        moves.carry_out_triton(add=add) if by_kernel else moves.carry_out(add=add)
        for source, target, place, scaling in zip(
            sources, targets, (slice(8, 16), slice(0, 16)), (0.5, 1.0), strict=True
        ):
            truth = source.float() * scaling + (1 if add else 0)
            assert torch.allclose(
                target[:, place].float(), truth, rtol=1e-2 if kinds[1] == torch.bfloat16 else 1e-6
            )
            target[:, place] = 1
            assert bool((target == 1).all())  # nothing beside it


@pytest.mark.parametrize("dtype", list(MARKS))
@pytest.mark.parametrize("size", [50, 9000])
def test_cross_entropy_and_its_gradient_in_place(dtype, size):
    torch.manual_seed(0)
    logits, labels = (4 * torch.randn(3, size)).to(dtype), torch.tensor([0, size - 1, 7])
    wide = logits.double().requires_grad_()
    truth = torch.nn.functional.cross_entropy(wide, labels, reduction="none")
    (slope,) = torch.autograd.grad(truth.sum(), wide)
    found = importlib.import_module("glassloop.engines.fused.loss")
    for one in (found.cross_entropy_reference_, *([found.cross_entropy_] if INTERPRETED else [])):
        losses, room = torch.zeros(3), logits.clone()
        one(room, labels, losses)
        assert off(losses, truth.detach()) < 1e-6
        assert off(room, slope) < MARKS[dtype]
