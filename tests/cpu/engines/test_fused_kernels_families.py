"""Kernels that families other than Llama need, held to fp64: norms of heads, gelu, parts of a
rotation, windows, caps.
"""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch
from kernel_cases import CUTS, INTERPRETED, MARKS, interpreted, kernels, off, strided, wide_heads

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton, which has no build for this system",
)


@pytest.mark.parametrize("dtype", list(MARKS))
@pytest.mark.parametrize(("queries", "keys", "size"), [(1, 1, 16), (9, 3, 24)])
def test_norms_of_heads(dtype, queries, keys, size):
    """More heads than a program takes, a size that is no power of 2."""
    torch.manual_seed(0)
    heads = queries + keys
    width = heads * size
    x, grad = (torch.randn(5, width + 8).to(dtype) for _ in range(2))
    weights = tuple((torch.rand(size) + 0.5).to(dtype) for _ in range(2))
    wide = x[:, :width].double().requires_grad_()
    each = torch.cat([weights[0].expand(queries, -1), weights[1].expand(keys, -1)]).double()
    by_head = wide.view(5, heads, size)
    unit = by_head * torch.rsqrt(by_head.pow(2).mean(-1, keepdim=True) + 1e-5)
    truth = (unit * each).flatten(1)
    (slope,) = torch.autograd.grad(truth, wide, grad[:, :width].double())
    for forward, backward in zip(
        kernels("norm.norm_heads"), kernels("norm.norm_heads_backward"), strict=True
    ):
        out, into = strided(5, width, dtype), grad.clone()
        forward(x[:, :width], weights, keys, 1e-5, out[:, :width])
        assert off(out[:, :width], truth.detach()) < MARKS[dtype] and not out[:, width:].any()
        backward(into[:, :width], x[:, :width], weights, keys, 1e-5)
        assert off(into[:, :width], slope) < MARKS[dtype]
        assert torch.equal(into[:, width:], grad[:, width:])


@pytest.mark.parametrize("dtype", list(MARKS))
def test_the_norm_s_gradient_may_be_written_over_its_own(dtype):
    torch.manual_seed(0)
    x, grad, weight = torch.randn(5, 96).to(dtype), torch.randn(5, 96).to(dtype), torch.rand(96)
    wide = x.double().requires_grad_()
    truth = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()
    (slope,) = torch.autograd.grad(truth, wide, grad.double())
    for backward in kernels("norm.norm_backward"):
        into = grad.clone()
        backward(into, x, weight, 1e-5, into, add=False)
        assert off(into, slope) < MARKS[dtype]


@pytest.mark.parametrize("dtype", list(MARKS))
@pytest.mark.parametrize("width", [48, 1040])
def test_the_gate_with_gelu(dtype, width):
    torch.manual_seed(0)
    gate_up, grad = (3 * torch.randn(4, 2 * width)).to(dtype), torch.randn(4, width).to(dtype)
    both = gate_up.double().requires_grad_()
    act = torch.nn.functional.gelu(both[:, :width], approximate="tanh")
    truth = act * both[:, width:]
    (slope,) = torch.autograd.grad(truth, both, grad.double())
    for forward, backward in zip(
        kernels("swiglu.swiglu"), kernels("swiglu.swiglu_backward"), strict=True
    ):
        out, place, down = strided(4, width, dtype), gate_up.clone(), grad.clone()
        forward(gate_up, out[:, :width], gelu=True)
        assert off(out[:, :width], truth.detach()) < MARKS[dtype] and not out[:, width:].any()
        backward(down, place, gelu=True)
        assert off(place, slope) < MARKS[dtype] and off(down, truth.detach()) < MARKS[dtype]


@pytest.mark.parametrize("dtype", list(MARKS))
@pytest.mark.parametrize(("size", "pairs"), [(16, 8), (24, 6), (32, 12)])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_part_of_a_head_is_turned(dtype, size, pairs, interleaved, in_place):
    """The rest stays. Interleaved: as GLM-4 of transformers has it."""
    from transformers.models.glm4.modeling_glm4 import apply_rotary_pos_emb as neighbours
    from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as halves

    from glassloop.engines.fused.rotary import angles

    torch.manual_seed(0)
    positions = torch.tensor([0, 1, 2, 0, 90])
    by = angles(positions, torch.rand(pairs), 1.1, size=size, interleaved=interleaved)
    x = torch.randn(5, 3 * size).to(dtype)
    q = x.double().view(1, 5, 3, size).transpose(1, 2)
    wide = [torch.cat([t, t], dim=1).double().unsqueeze(0) for t in (by.cos, by.sin)]
    truth = (neighbours if interleaved else halves)(q, q, *wide)[0].transpose(1, 2).reshape(5, -1)
    for rotate in kernels("rotary.rotate"):
        out = strided(5, 3 * size, dtype)[:, : 3 * size]
        if in_place:
            out.copy_(x)
        rotate(out if in_place else x, by, out)
        assert off(out, truth) < MARKS[dtype]


@pytest.mark.parametrize("dtype", list(MARKS))
@pytest.mark.parametrize(("scale", "cap"), [(0.25, None), (1.0, 3.0), (0.5, 2.0)])
def test_cross_entropy_of_scaled_and_capped_logits(dtype, scale, cap):
    torch.manual_seed(0)
    products, labels = (4 * torch.randn(3, 9000)).to(dtype), torch.tensor([0, 8999, 7])
    wide = products.double().requires_grad_()
    logits = wide * scale if cap is None else cap * torch.tanh(wide * scale / cap)
    truth = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    (slope,) = torch.autograd.grad(truth.sum(), wide)
    found = importlib.import_module("glassloop.engines.fused.loss")
    for one in (found.cross_entropy_reference_, *([found.cross_entropy_] if INTERPRETED else [])):
        losses, room = torch.zeros(3), products.clone()
        one(room, labels, losses, scale=scale, cap=cap)
        assert off(losses, truth.detach()) < 1e-6
        assert off(room, slope) < MARKS[dtype]


def truth_of(q, k, v, grad, lengths, scores):
    """Output and the gradients of q, k, v in fp64, by one dense matrix of scores."""
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    tokens, heads, size = q.shape
    shared = [t.repeat_interleave(heads // k.shape[1], 1) for t in leaves[1:]]
    products = torch.einsum("qhd,khd->hqk", leaves[0], shared[0]) * scores.scale_of(size)
    if scores.cap is not None:
        products = scores.cap * torch.tanh(products / scores.cap)
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    apart = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
    seen = (row[:, None] == row[None, :]) & (apart >= 0)
    if scores.window is not None:
        seen &= apart < scores.window
    shares = products.masked_fill(~seen, -torch.inf).softmax(2)
    out = torch.einsum("hqk,khd->qhd", shares, shared[1])
    return out.detach(), torch.autograd.grad(out, leaves, grad.double())


SCORES = [(None, None, 1), (None, None, 7), (0.3, 2.0, None), (0.2, 1.5, 20), (None, None, 33)]


@pytest.mark.parametrize(("scale", "cap", "window"), SCORES)
@pytest.mark.parametrize(
    "lengths", [(1, 5, 17, 40), pytest.param((32, 16, 33), marks=pytest.mark.thorough)]
)
@pytest.mark.parametrize("cuts", [None, CUTS[1], CUTS[2]], ids=str)
def test_windows_and_caps(scale, cap, window, lengths, cuts):
    """The reference (None), and the kernels with blocks of several sizes."""
    from glassloop.engines.fused import attention as a
    from glassloop.engines.fused.attention_work import Scores, Tile, Tiles

    if cuts is not None and not INTERPRETED:
        pytest.skip("runs in the process that test_fused_kernels.py starts")
    scores, cpu = Scores(scale, cap, window), torch.device("cpu")
    tiles = None
    if cuts is not None:
        tiles = Tiles(*(Tile(own, step, 4, 2, split) for own, step, split in cuts))
    kernel = "reference" if cuts is None else "triton"
    bounds = a.Bounds.for_kernel(kernel, lengths, cpu, tiles, scores)
    grad, q, k, v, by = wide_heads(sum(lengths), 2, 1, 16, torch.float32)
    out, slopes = truth_of(q, k, v, grad, lengths, scores)
    kept = a.attention(q, k, v, bounds)
    assert off(kept.out, out) < 3e-6
    into = a.attention_backward(grad, q, k, v, kept, bounds, by)
    for found, slope, turned in zip(into.split([32, 16, 16], 1), slopes, (1, 1, 0), strict=True):
        if turned:
            a.rotate(found, by, found)  # forward again
        if slope.norm() > 0:
            assert off(found, slope.flatten(1)) < 5e-6
        else:  # a window of one token: q and k have no gradient
            assert float(found.norm()) < 1e-5


@pytest.mark.parametrize("queries", [3, 16, 1024])
def test_blocks_of_queries_of_a_capped_row(monkeypatch, queries):
    from glassloop.engines.fused import attention as a
    from glassloop.engines.fused.attention_work import Scores

    monkeypatch.setattr(a, "QUERIES", queries)
    scores = Scores(0.3, 2.0, 9)
    bounds = a.Bounds.for_kernel("reference", (16,), torch.device("cpu"), scores=scores)
    grad, q, k, v, _ = wide_heads(16, 2, 1, 16, torch.float32)
    assert off(a.attention(q, k, v, bounds).out, truth_of(q, k, v, grad, (16,), scores)[0]) < 3e-6


@interpreted
@pytest.mark.parametrize(("pairs", "interleaved"), [(4, False), (8, True)])
def test_the_kernels_gradient_of_a_part_that_is_turned(pairs, interleaved):
    from glassloop.engines.fused import attention as a
    from glassloop.engines.fused.attention_work import Tile, Tiles
    from glassloop.engines.fused.rotary import angles

    lengths, tile, cpu = (5, 20), Tile(16, 16, 4, 2), torch.device("cpu")
    grad, q, k, v, _ = wide_heads(25, 4, 2, 16, torch.float32)
    by = angles(torch.arange(25), torch.rand(pairs), 1.0, size=16, interleaved=interleaved)
    found = []
    for kernel in ("triton", "reference"):
        bounds = a.Bounds.for_kernel(kernel, lengths, cpu, Tiles(tile, tile, tile))
        kept = a.attention(q, k, v, bounds)
        found.append(a.attention_backward(grad, q, k, v, kept, bounds, by))
    assert off(found[0], found[1].double()) < 3e-6


class Card:
    """A GPU's name for `choose_kernel`, which asks torch for its capability."""

    type = "cuda"


@pytest.mark.parametrize(
    ("capability", "size", "scores", "lengths", "kernel"),
    [
        (9, 128, {}, (300, 200), "triton"),
        (9, 128, {}, (2048, 2048), "cudnn"),
        (9, 128, {"window": 1024}, (2048, 2048), "triton"),
        (9, 256, {"window": 1024}, (2048, 2048), "flash"),
        (9, 256, {}, (2048, 2048), "flash"),
        (9, 96, {}, (300, 200), "flash"),
        (9, 128, {"cap": 50.0}, (300, 200), "triton"),
        (9, 256, {"cap": 50.0}, (300, 200), "reference"),
        (8, 128, {"cap": 50.0}, (300, 200), "reference"),
        (8, 128, {"window": 9}, (300, 200), "flash"),
        (9, 20, {}, (300, 200), "reference"),
        (9, 512, {}, (300, 200), "reference"),
    ],
)
def test_the_kernel_computes_the_scores_that_are_asked(
    monkeypatch, capability, size, scores, lengths, kernel
):
    from glassloop.engines.fused.attention import choose_kernel
    from glassloop.engines.fused.attention_work import Scores

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (capability, 0))
    card: torch.device = Card()  # type: ignore[assignment]
    assert choose_kernel(lengths, card, torch.bfloat16, size, Scores(**scores)) == kernel
