"""The fused engine's Triton kernels under Triton's interpreter.

On a CPU, held to fp64 truth or, where bits are promised, to bitsandbytes.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton, which has no build for this system",
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(INTERPRETED, reason="this is the process that the test below starts")
def test_kernels_under_the_interpreter():
    """In its own process: Triton decides when a kernel is defined."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-o",
            "addopts=",
            str(Path(__file__)),
        ],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "failed" not in done.stdout


interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="runs in the process that the first test starts"
)


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


SHAPES = [[(64, 64)], [(96, 128), (32, 128), (32, 128)], [(24, 4160), (8, 4160)]]


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


def as_stored(value: torch.Tensor, dtype: torch.dtype, *, by_kernel: bool) -> torch.Tensor:
    """fp32 in another dtype, as it is stored.

    Rounded to the nearest, but the interpreter cuts the lower bits of a bf16 off.
    """
    if by_kernel and dtype == torch.bfloat16:
        value = (value.view(torch.int32) & -65536).view(torch.float32)
    return value.to(dtype)


def strided(rows: int, columns: int, dtype: torch.dtype, room: int = 16) -> torch.Tensor:
    return torch.zeros(rows, columns + room, dtype=dtype)


def kernels(name: str):
    """(reference, kernel) of a module's function.

    The kernel only where it can run.
    """
    module, function = name.split(".")
    found = importlib.import_module(f"glassloop.engines.fused.{module}")
    names = [f"{function}_reference", *([f"{function}_triton"] if INTERPRETED else [])]
    return [getattr(found, one) for one in names]


MARKS = {
    torch.float32: 3e-6,
    torch.bfloat16: 1e-2,
}  # relative L2 against fp64: a few units of rounding


def off(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


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
    cos, sin = angles(positions, frequencies, 1.0)
    x = torch.randn(6, heads * size).to(dtype)
    q = x.double().view(1, 6, heads, size).transpose(1, 2)
    wide = [torch.cat([t, t], dim=1).double().unsqueeze(0) for t in (cos, sin)]
    truth = apply_rotary_pos_emb(q, q, *wide)[0].transpose(1, 2).reshape(6, -1)
    for rotate in kernels("rotary.rotate"):
        out = strided(6, heads * size, dtype)
        rotate(x, cos, sin, out[:, : heads * size])
        assert (
            off(out[:, : heads * size], truth) < MARKS[dtype] and not out[:, heads * size :].any()
        )
        rotate(out[:, : heads * size], cos, sin, out[:, : heads * size], back=True)  # in place
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


def test_attention_programs_cover_every_token_once_and_the_longest_walks_come_first():
    from glassloop.engines.fused.attention_work import Tile, Tiles, programs

    lengths = (1, 5, 16, 17, 40)
    starts = [0, 1, 6, 22, 39]
    forward, queries, keys = programs(
        lengths, Tiles(Tile(16, 8, 4, 2), Tile(8, 16, 4, 2), Tile(16, 16, 4, 2))
    )
    for flat, own, to_the_end in ((forward, 16, False), (queries, 8, False), (keys, 16, True)):
        entries = list(zip(*[iter(flat)] * 4, strict=True))
        walks = [length - first if to_the_end else first for _, length, first, _ in entries]
        assert walks == sorted(walks, reverse=True)
        found = [
            start + at
            for start, length, first, _ in entries
            for at in range(first, min(first + own, length))
        ]
        assert sorted(found) == list(range(sum(lengths)))
        assert all(length == lengths[starts.index(start)] for start, length, _, _ in entries)


def wide_heads(tokens: int, heads: int, key_heads: int, size: int, dtype: torch.dtype):
    """q, k, v side by side, with room; angles; a gradient.

    As a layer has them. The gradient has wider rows too.
    """
    from glassloop.engines.fused.rotary import angles

    torch.manual_seed(0)
    widths = [heads * size, key_heads * size, key_heads * size]
    wide = torch.randn(tokens, sum(widths) + 16).to(dtype)
    q, k, v = (t.unflatten(1, (-1, size)) for t in wide[:, :-16].split(widths, dim=1))
    grad = torch.randn(tokens, widths[0] + 16).to(dtype)[:, :-16].unflatten(1, (-1, size))
    cos, sin = angles(torch.arange(tokens), torch.rand(size // 2), 1.0)
    return grad, q, k, v, cos, sin


# (own, step, split) of forward, queries and keys: blocks as long as a step, longer, shorter, with
# one loop.
CUTS = [
    ((16, 16, True), (16, 16, True), (16, 16, True)),
    ((32, 16, True), (32, 16, False), (32, 16, True)),
    ((16, 32, True), (16, 32, True), (16, 32, True)),
    ((32, 16, False), (32, 16, True), (16, 32, False)),
]


@interpreted
@pytest.mark.parametrize(("dtype", "mark"), [(torch.float32, 3e-6), (torch.float16, 2e-3)])
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize(
    ("lengths", "heads", "key_heads"),
    [((1, 5, 17, 40), 4, 1), ((32, 16, 33), 6, 2), ((31, 48), 2, 2)],
)
def test_attention_and_its_gradient_before_rotation(dtype, mark, cuts, lengths, heads, key_heads):
    """Every row by itself, whatever its length leaves of a block.

    Nothing is written beside the columns that are its own. The interpreter has no product in bf16.
    """
    from glassloop.engines.fused import attention as a
    from glassloop.engines.fused import attention_triton
    from glassloop.engines.fused.attention_work import Tile, Tiles

    size, tokens = 16, sum(lengths)
    tiles = Tiles(*(Tile(own, step, 4, 2, split) for own, step, split in cuts))
    bounds = a.Bounds.for_kernel("triton", lengths, torch.device("cpu"), tiles)
    plain = a.Bounds.for_kernel("reference", lengths, torch.device("cpu"))
    grad, q, k, v, cos, sin = wide_heads(tokens, heads, key_heads, size, dtype)
    kept = a.attention(q, k, v, bounds)
    into = torch.full((tokens, (heads + 2 * key_heads) * size + 16), 7.0, dtype=dtype)
    attention_triton.backward(
        grad, q, k, v, kept.out, kept.rest[0], cos, sin, bounds.work, into[:, :-16]
    )

    exact = [t.double() for t in (grad, q, k, v)]
    out = a.attention(*exact[1:], plain)
    truth = a.attention_backward(*exact, out, plain, cos.double(), sin.double())
    scores = (
        torch.einsum("qhd,khd->hqk", exact[1], exact[2].repeat_interleave(heads // key_heads, 1))
        * size**-0.5
    )
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = (row[:, None] == row[None, :]) & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    assert torch.allclose(
        kept.rest[0].double() * math.log(2),
        scores.masked_fill(~seen, -math.inf).logsumexp(2),
        atol=1e-4,
    )
    assert kept.out.is_contiguous() and off(kept.out, out.out) < mark
    for start, end in pairwise(
        [0, *accumulate(lengths)]
    ):  # a row of one token has no gradient in q and k, so with another
        assert off(into[start:end, :-16], truth[start:end]) < mark
    queries, keys = heads * size, key_heads * size
    for part in (slice(0, queries), slice(queries, queries + keys), slice(queries + keys, -16)):
        assert (
            off(into[:, part], truth[:, part] if part.stop > 0 else truth[:, part.start :]) < mark
        )
    assert bool((into[:, -16:] == 7).all())


@interpreted
def test_a_row_without_finite_values_leaves_its_neighbours_alone():
    from glassloop.engines.fused import attention as a
    from glassloop.engines.fused.attention_work import Tile, Tiles

    lengths, tile = (20, 9, 20), Tile(16, 16, 4, 2)
    bounds = a.Bounds.for_kernel("triton", lengths, torch.device("cpu"), Tiles(tile, tile, tile))
    grad, q, k, v, cos, sin = wide_heads(sum(lengths), 2, 1, 16, torch.float32)
    for t in (grad, q, k, v):
        t[20:29] = torch.nan
    kept = a.attention(q, k, v, bounds)
    into = a.attention_backward(grad, q, k, v, kept, bounds, cos, sin)
    for t in (kept.out.flatten(1), into):
        assert t[20:29].isnan().all() and t[:20].isfinite().all() and t[29:].isfinite().all()
