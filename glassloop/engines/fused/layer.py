"""A decoder layer, forward and backward, written out.

    x  = what comes in                      q, k, v = turned n1 (W_qkv)^T,   n1 = norm(x)
    m  = x + attention(q, k, v) W_o^T       gate, up = n2 (W_gate_up)^T,     n2 = norm(m)
    out = m + (act(gate) * up) W_down^T

That is Llama's. A description (plan/described.py) says where another family differs: a norm that
follows a product or stands on q and k, a norm less, a factor of what is added, another act.

The sums are left to the norm that follows, which has to read both parts anyway: a layer takes and
gives pairs of which x is the sum. What backward needs is the smallest set: norms and the gate's
product are computed again from it, and the product of W_down never is.

A layer that is not kept whole leaves x alone, or x with attention's output, or both with m: three
tensors of one size. With the second attention is not computed again, with the third neither that
nor the product of W_o. Where a norm follows W_o, its product is left in place of m. Where a norm
follows W_down, that product is left beside x.

Legend: T tokens, S places where the output is wanted, H hidden size, I intermediate size, D head
size, N rows of a group's weights, R columns of its adapters.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from glassloop.engines.fused.attention import Bounds, Kept, attention, attention_backward
from glassloop.engines.fused.attention_groups import backward_by_groups, forward_by_groups
from glassloop.engines.fused.heads import turn, turned_again, unnorm
from glassloop.engines.fused.linear import Linear
from glassloop.engines.fused.norm import add_norm, norm_backward
from glassloop.engines.fused.parts import Attended, Layer, Middle, Saved, Where, chosen, spread
from glassloop.engines.fused.swiglu import swiglu, swiglu_backward
from glassloop.predict.tiers import Host


def first_half(
    layer: Layer,
    x: Tensor,
    y: Tensor | None,
    where: Where,
    places: Tensor | None,
    known: Attended | None = None,
) -> tuple[Tensor, Middle]:
    """Compute a layer up to its gate; after attention for `places` alone.

    Returns x + y (T, H) and what lies between. `known`: results to reuse.
    """
    tokens, hidden = x.shape
    normed_x = layer.qkv.input(tokens)
    x = sum_and_norm(layer, x, y, layer.norm_in, normed_x[:, :hidden])
    qkv = layer.qkv.forward(normed_x, where.scratch.weights(layer.qkv))
    narrow_qkv = layer.qkv.narrow(normed_x)
    turned = turn(layer, qkv, where.angles[layer.kind.rotary])
    if known is None:
        kept = attend(layer.split(qkv, turned), where.bounds[layer.kind.window], where)
        del turned  # computed again where it is no part of qkv
    else:
        kept = known.kept
    if known is None or known.mid is None:
        attended = chosen(kept.out.flatten(1), places)
        seen = layer.o.input(len(attended))
        seen[:, : layer.o.columns].copy_(attended)
        product = layer.o.forward(seen, where.scratch.weights(layer.o))
        narrow_o = layer.o.narrow(seen)
        del seen
    else:
        assert known.narrow_o is not None
        narrow_o = known.narrow_o
        product = None if layer.norm_after_o is None else known.mid
    if product is None:  # m itself was left
        assert known is not None and known.mid is not None
        mid, y = known.mid, None
    else:
        mid, y = chosen(x, places), added(layer, product, layer.norm_after_o)
    normed_mid = layer.gate_up.input(len(mid))
    mid = sum_and_norm(layer, mid, y, layer.norm_mid, normed_mid[:, :hidden])
    gate_up = layer.gate_up.output(len(mid))
    layer.gate_up.forward(
        normed_mid, where.scratch.weights(layer.gate_up), out=gate_up[:, : layer.gate_up.rows]
    )
    return x, Middle(
        qkv=qkv,
        kept=kept,
        product=None if layer.norm_after_o is None else product,
        mid=mid,
        gate_up=gate_up,
        narrow_qkv=narrow_qkv,
        narrow_o=narrow_o,
        narrow_gate_up=layer.gate_up.narrow(normed_mid),
        normed_x=normed_x,
        normed_mid=normed_mid,
    )


def attend(parts: tuple[Tensor, Tensor, Tensor], bounds: Bounds, where: Where) -> Kept:
    """Attention of q, k, v, with the ranks that share the pass."""
    if where.exchange is None:
        return attention(*parts, bounds)
    return forward_by_groups(*parts, bounds, where.exchange, most=1)


def sum_and_norm(
    layer: Layer, x: Tensor, y: Tensor | None, weight: Tensor | None, out: Tensor
) -> Tensor:
    """Write norm(x + y) to `out` (T, H), and return the sum.

    Without a norm, write the sum itself.
    """
    if weight is not None:
        return add_norm(x, y, weight, layer.of.eps, out)
    s = x if y is None else x + y
    out.copy_(s)
    return s


def added(layer: Layer, product: Tensor, weight: Tensor | None) -> Tensor:
    """(T, H): what a product (T, H) adds to the residual stream."""
    if weight is not None:
        out = torch.empty_like(product)
        add_norm(product, None, weight, layer.of.eps, out)
        product = out
    scale = layer.of.residual_scale
    return product if scale == 1 else product * scale


def product_gradient(
    layer: Layer, grad: Tensor, product: Tensor | None, weight: Tensor | None, linear: Linear
) -> Tensor:
    """The reverse of `added`: (T, H + R).

    It has room for the adapters of `linear`.

    grad: (T, H + R or more), of the residual stream; its own memory if nothing lies between.
    """
    hidden, scale = linear.rows, layer.of.residual_scale
    if weight is None and scale == 1:
        return grad[:, : hidden + linear.rank]
    out = linear.output(len(grad))
    if weight is None:
        torch.mul(grad[:, :hidden], scale, out=out[:, :hidden])
        return out
    assert product is not None
    norm_backward(grad[:, :hidden], product, weight, layer.of.eps, out[:, :hidden], add=False)
    if scale != 1:
        out[:, :hidden] *= scale
    return out


def forward(
    layer: Layer,
    x: Tensor,
    y: Tensor | None,
    where: Where,
    *,
    keep: bool | None,
    away: Host = "nothing",
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor, Saved | None]:
    """One layer of a pass.

    Args:
        x, y: (T, H), whose sum comes in; y None: x alone.
        places: (S,) int64, where alone the output is wanted, as the loss does of the last
            layer; None: everywhere.
        keep: keep what lies between for backward; False: the input alone; None: there will be
            no backward.
        away: with keep = False, what goes to the host; the input is kept in any case.

    Returns:
        Two parts of the output, (T, H) or (S, H), and what backward needs.
    """
    x, middle = first_half(layer, x, y, where, places)
    middle = replace(middle, normed_x=None, normed_mid=None)  # quick to compute again
    gated = layer.down.input(len(middle.mid))
    gelu = layer.of.gate == "gelu_tanh"
    swiglu(middle.gate_up[:, : layer.gate_up.rows], gated[:, : layer.down.columns], gelu=gelu)
    product = layer.down.forward(gated, where.scratch.weights(layer.down))
    narrow_down = None if keep is None else layer.down.narrow(gated)
    del gated
    y = added(layer, product, layer.norm_after_down)
    if narrow_down is None:
        return middle.mid, y, None
    attended = None
    if away in ("attention", "all"):
        left = middle.mid if middle.product is None else middle.product
        results = (left, middle.narrow_o) if away == "all" else (None, None)
        attended = Attended(middle.kept, *results)
    saved = Saved(
        x=x,
        narrow_down=narrow_down,
        product=None if layer.norm_after_down is None else product,
        middle=middle if keep else None,
        attended=attended,
        places=places,
    )
    return middle.mid, y, saved


def normed_again(
    layer: Layer, linear: Linear, known: Tensor | None, x: Tensor, weight: Tensor | None
) -> Tensor:
    """(T, H): norm(x) as `linear` read it.

    It lies in a matrix of the same strides, so that products have the same bits whether it is
    `known` or not.
    """
    if known is None:
        known = linear.input(len(x))
        sum_and_norm(layer, x, None, weight, known[:, : linear.columns])
    return known[:, : linear.columns]


def add_norm_gradient(
    layer: Layer, inner: Tensor, x: Tensor, weight: Tensor | None, into: Tensor
) -> None:
    """Add the gradient in x of norm(x) to `into` (T, H).

    `inner`: (T, H), the gradient in norm(x).
    """
    if weight is None:
        into.add_(inner)
    else:
        norm_backward(inner, x, weight, layer.of.eps, into)


def backward(layer: Layer, grad: Tensor, saved: Saved, where: Where, *, first: bool) -> Tensor:
    """Leave the adapters' gradients in the scratch; return the input's.

    `grad`, (T, H + R) or (S, H + R), is that of the layer's output and is written to; its last R
    columns are room for the adapters' share. Returns (T, H + R). `first`: nobody needs the gradient
    of the input, and what is returned is of no use.
    """
    x, hidden, places = saved.x, saved.x.shape[1], saved.places
    middle = saved.middle or first_half(layer, x, None, where, places, saved.attended)[1]
    qkv, o, gate_up, down = layer.linears
    weights = where.scratch.weights

    out = product_gradient(layer, grad, saved.product, layer.norm_after_down, down)
    down.fold(out)
    product = down.input_gradient(out, weights(down))  # (T, I), of act(gate) * up
    # then product is that itself, and gate_up its own gradient
    swiglu_backward(product, middle.gate_up[:, : gate_up.rows], gelu=layer.of.gate == "gelu_tanh")
    down.accumulate(out, product, saved.narrow_down, where.scratch)
    del product, out

    normed = normed_again(layer, gate_up, middle.normed_mid, middle.mid, layer.norm_mid)
    gate_up.fold(middle.gate_up)
    gate_up.accumulate(middle.gate_up, normed, middle.narrow_gate_up, where.scratch)
    inner = gate_up.input_gradient(middle.gate_up, weights(gate_up))  # (T, H)
    add_norm_gradient(layer, inner, middle.mid, layer.norm_mid, grad[:, :hidden])

    out = product_gradient(layer, grad, middle.product, layer.norm_after_o, o)
    o.fold(out)
    o.accumulate(out, chosen(middle.kept.out.flatten(1), places), middle.narrow_o, where.scratch)
    inner = spread(o.input_gradient(out, weights(o)), places, len(x)).unflatten(
        1, (-1, layer.of.head_size)
    )
    del out
    by, bounds = where.angles[layer.kind.rotary], where.bounds[layer.kind.window]
    parts = layer.split(middle.qkv, turned_again(layer, middle.qkv, by))
    how = inner, *parts, middle.kept, bounds, by
    if where.exchange is None:
        out = attention_backward(*how, room=qkv.rank)  # (T, N + R)
    else:
        out = backward_by_groups(*how, room=qkv.rank, exchange=where.exchange, most=1)
    del parts, how
    unnorm(layer, out, middle.qkv)

    grad = spread(grad, places, len(x))
    normed = normed_again(layer, qkv, middle.normed_x, x, layer.norm_in)
    qkv.fold(out)
    qkv.accumulate(out, normed, middle.narrow_qkv, where.scratch)
    if not first:
        inner = qkv.input_gradient(out, weights(qkv))
        add_norm_gradient(layer, inner, x, layer.norm_in, grad[:, :hidden])
    return grad
