"""Queries and keys between their product and attention.

They are normed if the family does that, and rotated.
"""

from __future__ import annotations

from torch import Tensor

from glassloop.engines.fused.norm import (
    add_norm,
    norm_backward,
    norm_heads,
    norm_heads_backward,
)
from glassloop.engines.fused.parts import Layer
from glassloop.engines.fused.rotary import Angles, rotate


def turn(layer: Layer, qkv: Tensor, by: Angles, out: Tensor | None = None) -> Tensor:
    """(T, columns of q and k), as attention reads them.

    qkv: (T, N). Without a norm q and k are turned in place; else it stays, for `unnorm`, and `out`
    takes what was turned.
    """
    both = qkv[:, : layer.turned]
    if layer.norm_qk is None:
        rotate(both, by, both)
        return both
    out = both.new_empty(both.shape) if out is None else out
    if layer.of.head_norms == "whole":
        for x, weight, to in _by_part(layer, both, out):
            add_norm(x, None, weight, layer.of.eps, to)
    else:
        norm_heads(both, layer.norm_qk, layer.of.key_heads, layer.of.eps, out)
    rotate(out, by, out)
    return out


def turned_again(layer: Layer, qkv: Tensor, by: Angles) -> Tensor:
    """As `turn`, of a matrix (T, N) that it has been through."""
    return qkv[:, : layer.turned] if layer.norm_qk is None else turn(layer, qkv, by)


def unnorm(layer: Layer, grad: Tensor, qkv: Tensor) -> None:
    """Replace the gradient of normed q and k, in place.

    By that of their product.

    grad: (T, N + R), whose first columns are q's and k's, turned back. qkv: as `turn` left it.
    """
    if layer.norm_qk is None:
        return
    both, slope = qkv[:, : layer.turned], grad[:, : layer.turned]
    if layer.of.head_norms == "whole":
        for x, weight, into in _by_part(layer, both, slope):
            norm_backward(into, x, weight, layer.of.eps, into, add=False)
    else:
        norm_heads_backward(slope, both, layer.norm_qk, layer.of.key_heads, layer.of.eps)


def _by_part(layer: Layer, x: Tensor, to: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Columns of q, then of k, with their norm's weight.

    Columns of x and of `to`.
    """
    assert layer.norm_qk is not None
    queries = layer.of.heads * layer.of.head_size
    q, k = layer.norm_qk
    return [(x[:, :queries], q, to[:, :queries]), (x[:, queries:], k, to[:, queries:])]
