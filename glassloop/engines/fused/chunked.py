"""A decoder layer over chunks of places, for long passes.

It computes what layer.py computes. Products, norms and the gate take some thousand places at a
time, so that neither gate and up nor their gradients exist for the whole pass. Attention sees all
places, for some heads at a time. An adapter's gradient is the sum over
chunks, in fp32 and in their order. No layer is kept whole.

Legend: see layer.py; C places of a chunk, A columns of attention's output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glassloop.engines.fused.attention import Kept
from glassloop.engines.fused.attention_groups import backward_by_groups, forward_by_groups
from glassloop.engines.fused.heads import turn, unnorm
from glassloop.engines.fused.layer import (
    add_norm_gradient,
    added,
    product_gradient,
    sum_and_norm,
)
from glassloop.engines.fused.parts import Attended, Layer, Saved, Where, chosen, spread
from glassloop.engines.fused.swiglu import swiglu, swiglu_backward
from glassloop.predict.tiers import Host


@dataclass(frozen=True)
class Queries:
    """The product of W_qkv, as attention and its gradient read it."""

    qkv: Tensor  # (T, N)
    turned: Tensor  # (T, columns of q and k): columns of qkv, unless a norm stands on them
    narrow: Tensor  # (T, R): x (sA)^T


@dataclass(frozen=True)
class Mid:
    """A chunk between attention and the gate."""

    mid: Tensor  # (C, H)
    normed: Tensor  # (C, H + R): as gate_up reads it
    product: Tensor | None  # (C, H): of W_o, where a norm follows it
    left: Tensor  # (C, H): what a layer leaves of it, m or that product
    narrow_o: Tensor  # (C, R)


def pieces(places: int, chunk: int) -> list[slice]:
    """Chunks of a pass, in order; the last may be smaller."""
    return [slice(start, min(start + chunk, places)) for start in range(0, places, chunk)]


def queries_of(
    layer: Layer, x: Tensor, y: Tensor | None, where: Where, chunk: int
) -> tuple[Tensor, Queries]:
    """x + y (T, H), in y's memory, and what attention reads."""
    linear, hidden = layer.qkv, x.shape[1]
    weights = where.scratch.weights(linear)
    qkv = x.new_empty(len(x), linear.rows)
    narrow = x.new_empty(len(x), linear.rank)
    turned, by = qkv[:, : layer.turned], where.angles[layer.kind.rotary]
    if layer.norm_qk is not None:
        turned = x.new_empty(turned.shape)
    for c in pieces(len(x), chunk):
        normed = linear.input(c.stop - c.start)
        s = sum_and_norm(
            layer, x[c], None if y is None else y[c], layer.norm_in, normed[:, :hidden]
        )
        if y is not None:
            y[c].copy_(s)
        linear.forward(normed, weights, out=qkv[c])
        narrow[c].copy_(normed[:, hidden:])
        del normed, s  # or they would live beside the next chunk's
        turn(layer, qkv[c], by.piece(c), out=turned[c])
    return x if y is None else y, Queries(qkv, turned, narrow)


def attend(layer: Layer, queries: Queries, where: Where) -> Kept:
    """Attention of the whole pass."""
    parts = layer.split(queries.qkv, queries.turned)
    return forward_by_groups(*parts, where.bounds[layer.kind.window], where.exchange)


def middle(
    layer: Layer, x: Tensor, out: Tensor, known: tuple[Tensor, Tensor] | None, where: Where
) -> Mid:
    """A chunk from attention's output (C, A) to the gate's input.

    x: (C, H). `known`: what the layer left of it, and the narrow product of W_o.
    """
    hidden = x.shape[1]
    if known is None:
        seen = layer.o.input(len(x))
        seen[:, : layer.o.columns].copy_(out)
        left = layer.o.forward(seen, where.scratch.weights(layer.o))
        narrow_o = seen[:, layer.o.columns :]
    else:
        left, narrow_o = known
    normed = layer.gate_up.input(len(x))
    if known is not None and layer.norm_after_o is None:  # m itself was left
        mid = sum_and_norm(layer, left, None, layer.norm_mid, normed[:, :hidden])
        return Mid(mid, normed, None, mid, narrow_o)
    y = added(layer, left, layer.norm_after_o)
    mid = sum_and_norm(layer, x, y, layer.norm_mid, normed[:, :hidden])
    if layer.norm_after_o is None:
        return Mid(mid, normed, None, mid, narrow_o)
    return Mid(mid, normed, left, left, narrow_o)


def forward(
    layer: Layer,
    x: Tensor,
    y: Tensor | None,
    where: Where,
    chunk: int,
    *,
    training: bool,
    away: Host = "nothing",
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor, Saved | None]:
    """One layer of a pass, see layer.forward. Writes to y.

    `training`: there will be a backward; `away`: what is left for it beside the input.
    """
    x, queries = queries_of(layer, x, y, where, chunk)
    kept = attend(layer, queries, where)
    attended = kept.out.flatten(1)
    del queries
    count, hidden = len(x) if places is None else len(places), x.shape[1]
    mid, y = x.new_empty(count, hidden), x.new_empty(count, hidden)
    after = training and layer.norm_after_down is not None
    product_down = x.new_empty(count, hidden) if after else None
    narrow_down = x.new_empty(count, layer.down.rank)
    left, narrow_o = None, None
    if training and away == "all":
        left = mid if layer.norm_after_o is None else x.new_empty(count, hidden)
        narrow_o = x.new_empty(count, layer.o.rank)
    weights, gelu = where.scratch.weights, layer.of.gate == "gelu_tanh"
    for c in pieces(count, chunk):
        one = middle(layer, _rows(x, places, c), _rows(attended, places, c), None, where)
        gate_up = layer.gate_up.forward(one.normed, weights(layer.gate_up))
        gated = layer.down.input(len(gate_up))
        swiglu(gate_up, gated[:, : layer.down.columns], gelu=gelu)
        del gate_up
        product = layer.down.forward(gated, weights(layer.down))
        y[c].copy_(added(layer, product, layer.norm_after_down))
        mid[c].copy_(one.mid)
        narrow_down[c].copy_(gated[:, layer.down.columns :])
        if product_down is not None:
            product_down[c].copy_(product)
        if left is not None and narrow_o is not None:
            left[c].copy_(one.left)
            narrow_o[c].copy_(one.narrow_o)
        del one, gated, product
    if not training:
        return mid, y, None
    results = Attended(kept, left, narrow_o) if away in ("attention", "all") else None
    return mid, y, Saved(x, narrow_down, product_down, None, results, places)


def backward(
    layer: Layer, grad: Tensor, saved: Saved, where: Where, chunk: int, *, first: bool
) -> Tensor:
    """Leave the adapters' gradients in the scratch; return the input's. See layer.backward."""
    x, places, queries = saved.x, saved.places, None
    kept = None if saved.attended is None else saved.attended.kept
    if kept is None:
        _, queries = queries_of(layer, x, None, where, chunk)
        kept = attend(layer, queries, where)
    slope = _before_attention(layer, grad, saved, kept, where, chunk)  # (S, A)
    if queries is None:
        _, queries = queries_of(layer, x, None, where, chunk)
    slope = spread(slope, places, len(x)).unflatten(1, (-1, layer.of.head_size))
    parts = layer.split(queries.qkv, queries.turned)
    by, bounds = where.angles[layer.kind.rotary], where.bounds[layer.kind.window]
    room, others = layer.qkv.rank, where.exchange
    out = backward_by_groups(
        slope, *parts, kept, bounds, by, room=room, chunk=chunk, exchange=others
    )  # (T, N + R)
    unnorm(layer, out, queries.qkv)
    narrow = queries.narrow
    del slope, parts, kept, queries
    grad, linear, hidden = spread(grad, places, len(x)), layer.qkv, x.shape[1]
    for number, c in enumerate(pieces(len(x), chunk)):
        normed = linear.input(c.stop - c.start)
        sum_and_norm(layer, x[c], None, layer.norm_in, normed[:, :hidden])
        linear.fold(out[c])
        linear.accumulate(out[c], normed[:, :hidden], narrow[c], where.scratch, add=number > 0)
        if not first:
            inner = linear.input_gradient(out[c], where.scratch.weights(linear))
            add_norm_gradient(layer, inner, x[c], layer.norm_in, grad[c][:, :hidden])
            del inner
        del normed
    return grad


def _before_attention(
    layer: Layer, grad: Tensor, saved: Saved, kept: Kept, where: Where, chunk: int
) -> Tensor:
    """Gradient (S, A) of attention's output; writes to grad."""
    _, o, gate_up, down = layer.linears
    weights, scratch, hidden = where.scratch.weights, where.scratch, saved.x.shape[1]
    attended = kept.out.flatten(1)
    slope = grad.new_empty(len(grad), o.columns)
    left = None if saved.attended is None else saved.attended.mid
    narrow_o = None if saved.attended is None else saved.attended.narrow_o
    for number, c in enumerate(pieces(len(grad), chunk)):
        known = None if left is None or narrow_o is None else (left[c], narrow_o[c])
        seen = _rows(attended, saved.places, c)
        one = middle(layer, _rows(saved.x, saved.places, c), seen, known, where)
        both = gate_up.output(len(seen))
        gate_up.forward(one.normed, weights(gate_up), out=both[:, : gate_up.rows])

        again = None if saved.product is None else saved.product[c]
        out = product_gradient(layer, grad[c], again, layer.norm_after_down, down)
        down.fold(out)
        product = down.input_gradient(out, weights(down))  # (C, I)
        swiglu_backward(product, both[:, : gate_up.rows], gelu=layer.of.gate == "gelu_tanh")
        down.accumulate(out, product, saved.narrow_down[c], scratch, add=number > 0)
        del product, out

        gate_up.fold(both)
        normed, narrow = one.normed[:, :hidden], one.normed[:, hidden:]
        gate_up.accumulate(both, normed, narrow, scratch, add=number > 0)
        inner = gate_up.input_gradient(both, weights(gate_up))
        add_norm_gradient(layer, inner, one.mid, layer.norm_mid, grad[c][:, :hidden])
        del both, inner

        out = product_gradient(layer, grad[c], one.product, layer.norm_after_o, o)
        o.fold(out)
        o.accumulate(out, seen, one.narrow_o, scratch, add=number > 0)
        torch.mm(out, weights(o)[:, : o.columns], out=slope[c])
        del one, known, seen, out, normed, narrow
    return slope


def _rows(t: Tensor, places: Tensor | None, c: slice) -> Tensor:
    """Rows of t (T, ...) in a chunk of the wanted places."""
    return t[c] if places is None else chosen(t, places[c])
