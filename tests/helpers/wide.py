"""Checks of tensors that pass a limit of offsets.

On a GPU the limit is 2^31 elements; on a CPU the checks themselves are tried with a small one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glassloop.engines.fused import attention as a
from glassloop.engines.fused import norm, rotary, swiglu
from glassloop.engines.fused.attention_groups import backward_by_groups, forward_by_groups
from glassloop.engines.fused.attention_work import TILES
from glassloop.engines.fused.rotary import angles

SEEN, ROUNDED = 4, 5e-3  # rows at the end; relative distance that bf16's rounding stays below


def off(value: Tensor, truth: Tensor) -> float:
    """Relative L2 distance; NaN where a value is none."""
    return float((value.double() - truth.double()).norm() / truth.double().norm())


def at_the_end(rows: Tensor, total: int) -> Tensor:
    """`rows` as the last ones of a matrix of zeros."""
    x = rows.new_zeros(total, rows.shape[1])
    x[-len(rows) :] = rows
    return x


def places_check(limit: int, device: torch.device, *, width: int, suffix: str) -> dict[str, float]:
    """Distances of each kernel's last rows from the same rows alone.

    suffix: "triton", or "reference" to try the check itself.
    """
    total = limit // width + SEEN - 1
    assert (total - SEEN) * width < limit < total * width, "the limit lies among the last rows"
    torch.manual_seed(0)
    drawn = [torch.randn(SEEN, width, device=device).bfloat16() for _ in range(2)]
    weight, size, eps = (torch.rand(width, device=device) + 0.5).bfloat16(), 16, 1e-5
    heads = (torch.rand(size, device=device) + 0.5, torch.rand(size, device=device) + 0.5)
    half, turns = width // 2, torch.rand(size // 2, device=device)
    few = angles(torch.arange(SEEN, device=device) + 7, turns, 1.0)
    many = angles(torch.arange(total, device=device) - (total - SEEN) + 7, turns, 1.0)

    def kernel(module: Any, name: str) -> Callable[..., Any]:
        return getattr(module, f"{name}_{suffix}")

    # Each writes its last argument; the first two are inputs, and may be written too.
    def turned(function: Callable[..., Any], x: Tensor, out: Tensor) -> None:
        function(x, few if len(x) == SEEN else many, out)

    kernels: dict[str, Callable[[Callable[..., Any], Tensor, Tensor, Tensor], object]] = {
        "norm.add_norm": lambda f, x, y, out: f(x, y, weight, eps, out),
        "norm.norm_backward": lambda f, x, y, out: f(x, y, weight, eps, out),
        "norm.norm_heads": lambda f, x, y, out: f(x, heads, 1, eps, out),
        "norm.norm_heads_backward": lambda f, x, y, out: f(out.copy_(x), y, heads, 1, eps),
        "rotary.rotate": lambda f, x, y, out: turned(f, x, out),
        "swiglu.swiglu": lambda f, x, y, out: f(x, out[:, :half]),
        "swiglu.swiglu_backward": lambda f, x, y, out: f(x[:, :half].contiguous(), out.copy_(y)),
    }
    modules = {"norm": norm, "rotary": rotary, "swiglu": swiglu}
    found = {}
    for name, call in kernels.items():
        module, _, function = name.partition(".")
        truth, result = torch.zeros_like(drawn[0]), drawn[0].new_zeros(total, width)
        call(kernel(modules[module], function), *(one.clone() for one in drawn), truth)
        call(kernel(modules[module], function), *(at_the_end(one, total) for one in drawn), result)
        assert truth.any(), name
        found[name] = off(result[-SEEN:], truth)
        del result
    return found


def product_check(limit: int, device: torch.device, *, width: int) -> float:
    """Distance of the last rows of a product (T, width)."""
    total = limit // width + SEEN - 1
    torch.manual_seed(0)
    x = torch.randn(total, 16, device=device).bfloat16()
    weight = torch.randn(16, width, device=device).bfloat16()
    return off(torch.mm(x, weight)[-SEEN:], torch.mm(x[-SEEN:], weight))


def attention_check(
    kernel: str, limit: int, beyond: int, device: torch.device, *, width: int, size: int = 128
) -> dict[str, float]:
    """Distances of attention inside a wide matrix from a narrow one's.

    Places are so many that the wide matrix ends `beyond` rows after the limit. `views`: the kernel
    gets views of the wide matrix, as a whole pass's layers give them. `groups`: by groups of heads,
    as a pass in chunks takes them.
    """
    heads, key_heads = 4, 2
    tokens = limit // width + beyond
    torch.manual_seed(0)
    own = torch.randn(tokens, (heads + 2 * key_heads) * size, device=device).bfloat16()
    wide = torch.zeros(tokens, width, device=device, dtype=torch.bfloat16)
    wide[:, -own.shape[1] :] = own
    grad = torch.randn(tokens, heads, size, device=device).bfloat16()
    by = angles(torch.arange(tokens, device=device), torch.rand(size // 2, device=device), 1.0)
    bounds = a.Bounds.for_kernel(kernel, (tokens,), device, TILES.get(size))

    def parts(matrix: Tensor) -> tuple[Tensor, ...]:
        columns = [heads * size, key_heads * size, key_heads * size]
        return tuple(t.unflatten(1, (-1, size)) for t in matrix.split(columns, dim=1))

    q, k, v = parts(own)
    kept = a.attention(q, k, v, bounds)
    truth = kept.out, a.attention_backward(grad, q, k, v, kept, bounds, by)
    q, k, v = parts(wide[:, -own.shape[1] :])
    ways: dict[str, tuple[Tensor, Tensor]] = {}
    kept = forward_by_groups(q, k, v, bounds)
    ways["groups"] = kept.out, backward_by_groups(grad, q, k, v, kept, bounds, by, chunk=8192)
    if kernel != "cudnn":  # which gets copies alone where a tensor may be that large
        kept = a.attention(q, k, v, bounds)
        ways["views"] = kept.out, a.attention_backward(grad, q, k, v, kept, bounds, by)
    del kept
    found = {}
    for name, made in ways.items():
        for what, one, right in zip(("out", "gradient"), made, truth, strict=True):
            found[f"{name}, {what}"] = off(one, right)
            found[f"{name}, {what}, last rows"] = off(one[-256:], right[-256:])
    return found
