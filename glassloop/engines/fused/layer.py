"""A decoder layer of the Llama family, forward and backward, written out.

    x  = what comes in                      q, k, v = rotated n1 (W_qkv)^T, n1 = norm(x)
    m  = x + attention(q, k, v) W_o^T       gate, up = n2 (W_gate_up)^T,     n2 = norm(m)
    out = m + (silu(gate) * up) W_down^T

The sums are left to the norm that follows, which has to read both parts anyway: a layer takes and
gives pairs of which x is the sum. What backward needs is the smallest set: norms and the gate's
product are computed again from it, and the product of W_down never is.

A layer that is not kept whole leaves x alone, or x with attention's output, or both with m: three
tensors of one size. With the second attention is not computed again, with the third neither that
nor the product of W_o.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from glassloop.engines.fused.attention import Bounds, Kept, attention, attention_backward
from glassloop.engines.fused.linear import Linear, Scratch
from glassloop.engines.fused.norm import add_norm, norm_backward
from glassloop.engines.fused.rotary import rotate
from glassloop.engines.fused.swiglu import swiglu, swiglu_backward
from glassloop.predict.tiers import Group, Host, Sizes


@dataclass(frozen=True)
class Layer:
    """One layer's frozen weights and adapters, and its shape."""

    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear
    norm_in: Tensor  # (H,)
    norm_mid: Tensor  # (H,)
    eps: float
    heads: int
    key_heads: int
    head_size: int

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.qkv, self.o, self.gate_up, self.down

    @property
    def turned(self) -> int:
        """Columns of q and k, which carry positions."""
        return (self.heads + self.key_heads) * self.head_size

    @property
    def sizes(self) -> Sizes:
        """Sizes that memory is counted from."""
        groups = (Group(one.rows, one.columns, one.rank) for one in self.linears)
        return Sizes(*groups, heads=self.heads, element=self.qkv.a.element_size())

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views (T, heads, D), (T, key heads, D) twice of (T, N)."""
        sizes = [
            self.heads * self.head_size,
            self.key_heads * self.head_size,
            self.key_heads * self.head_size,
        ]
        q, k, v = qkv.split(sizes, dim=1)
        return tuple(t.unflatten(1, (-1, self.head_size)) for t in (q, k, v))  # type: ignore[return-value]


@dataclass(frozen=True)
class Where:
    """Bounds, angles and scratch that all layers of a pass share."""

    bounds: Bounds
    cos: Tensor  # (T, D / 2) fp32
    sin: Tensor
    scratch: Scratch


@dataclass(frozen=True)
class Middle:
    """Tensors between a layer's input and its last product."""

    qkv: Tensor  # (T, N): q and k turned by their positions
    kept: Kept
    mid: Tensor  # (T, H)
    gate_up: Tensor  # (T, 2 I + R)
    narrow_qkv: Tensor  # (T, R): x (sA)^T of each group
    narrow_o: Tensor
    narrow_gate_up: Tensor
    normed_x: Tensor | None  # (T, H + R): as qkv read it; None: to be computed again
    normed_mid: Tensor | None  # (T, H + R): as gate_up read it; None: likewise


@dataclass(frozen=True)
class Attended:
    """Attention's results, and those of W_o; None: the latter are computed again."""

    kept: Kept
    mid: Tensor | None  # (T, H)
    narrow_o: Tensor | None  # (T, R)


@dataclass(frozen=True)
class Saved:
    """A layer's own memory between forward and backward."""

    x: Tensor  # (T, H)
    narrow_down: Tensor  # (T, R)
    middle: Middle | None  # None: to be computed again
    attended: Attended | None  # None: this too, or it is part of `middle`
    # (S,) int64: where the output was wanted; the middle's gate and what follows have S rows then.
    places: Tensor | None


def part(saved: Saved) -> tuple[Saved, tuple[Tensor, ...]]:
    """Split what a recomputed layer left into small and large tensors.

    The large ones are x (T, H) and, as far as they are kept, attention's output (T, heads * D) and
    m.
    """
    none, attended = saved.x.new_empty(0), saved.attended
    if attended is None:
        return replace(saved, x=none), (saved.x,)
    large = saved.x, attended.kept.out.flatten(1)
    kept = replace(attended.kept, out=none)
    if attended.mid is not None:
        large = (*large, attended.mid)
        attended = replace(attended, mid=none)
    return replace(saved, x=none, attended=replace(attended, kept=kept)), large


def join(layer: Layer, saved: Saved, large: Sequence[Tensor]) -> Saved:
    """The two together again."""
    x, *rest = large
    attended = saved.attended
    if attended is not None:
        kept = replace(attended.kept, out=rest[0].unflatten(1, (-1, layer.head_size)))
        attended = replace(attended, kept=kept, mid=rest[1] if len(rest) > 1 else None)
    return replace(saved, x=x, attended=attended)


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
    x = add_norm(x, y, layer.norm_in, layer.eps, normed_x[:, :hidden])
    qkv = layer.qkv.forward(normed_x, where.scratch.weights(layer.qkv))
    narrow_qkv = layer.qkv.narrow(normed_x)
    rotate(qkv[:, : layer.turned], where.cos, where.sin, qkv[:, : layer.turned])
    kept = attention(*layer.split(qkv), where.bounds) if known is None else known.kept
    if known is None or known.mid is None:
        attended, mid = chosen(kept.out.flatten(1), places), chosen(x, places)
        seen = layer.o.input(len(attended))
        seen[:, : layer.o.columns].copy_(attended)
        y = layer.o.forward(seen, where.scratch.weights(layer.o))
        narrow_o = layer.o.narrow(seen)
        del seen
    else:
        mid, narrow_o, y = known.mid, known.narrow_o, None
        assert narrow_o is not None
    normed_mid = layer.gate_up.input(len(mid))
    mid = add_norm(mid, y, layer.norm_mid, layer.eps, normed_mid[:, :hidden])
    gate_up = layer.gate_up.output(len(mid))
    layer.gate_up.forward(
        normed_mid, where.scratch.weights(layer.gate_up), out=gate_up[:, : layer.gate_up.rows]
    )
    narrow_gate_up = layer.gate_up.narrow(normed_mid)
    return x, Middle(
        qkv, kept, mid, gate_up, narrow_qkv, narrow_o, narrow_gate_up, normed_x, normed_mid
    )


def chosen(t: Tensor, places: Tensor | None) -> Tensor:
    """Rows of t (T, ...) at places (S,), or all of them."""
    return t if places is None else t.index_select(0, places)


def spread(t: Tensor, places: Tensor | None, tokens: int) -> Tensor:
    """The reverse of `chosen`: t's rows at places, else 0.

    (T, ...) of t (S, ...).
    """
    return t if places is None else t.new_zeros(tokens, *t.shape[1:]).index_copy_(0, places, t)


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
    product = layer.down.input(len(middle.mid))
    swiglu(middle.gate_up[:, : layer.gate_up.rows], product[:, : layer.down.columns])
    y = layer.down.forward(product, where.scratch.weights(layer.down))
    if keep is None:
        return middle.mid, y, None
    attended = None
    if away in ("attention", "all"):
        results = (middle.mid, middle.narrow_o) if away == "all" else (None, None)
        attended = Attended(middle.kept, *results)
    return (
        middle.mid,
        y,
        Saved(x, layer.down.narrow(product), middle if keep else None, attended, places),
    )


def normed_again(
    linear: Linear, known: Tensor | None, x: Tensor, weight: Tensor, eps: float
) -> Tensor:
    """(T, H): norm(x) as `linear` read it.

    It lies in a matrix of the same strides, so that products have the same bits whether it is
    `known` or not.
    """
    if known is None:
        known = linear.input(len(x))
        add_norm(x, None, weight, eps, known[:, : linear.columns])
    return known[:, : linear.columns]


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

    out = grad[:, : hidden + down.rank]
    down.fold(out)
    product = down.input_gradient(out, weights(down))  # (T, I), of silu(gate) * up
    swiglu_backward(
        product, middle.gate_up[:, : gate_up.rows]
    )  # now product is that itself, and gate_up its own gradient
    down.accumulate(out, product, saved.narrow_down, where.scratch)
    del product

    normed = normed_again(gate_up, middle.normed_mid, middle.mid, layer.norm_mid, layer.eps)
    gate_up.fold(middle.gate_up)
    gate_up.accumulate(middle.gate_up, normed, middle.narrow_gate_up, where.scratch)
    inner = gate_up.input_gradient(middle.gate_up, weights(gate_up))  # (T, H)
    norm_backward(inner, middle.mid, layer.norm_mid, layer.eps, grad[:, :hidden])

    out = grad[:, : hidden + o.rank]
    o.fold(out)
    o.accumulate(out, chosen(middle.kept.out.flatten(1), places), middle.narrow_o, where.scratch)
    inner = spread(o.input_gradient(out, weights(o)), places, len(x)).unflatten(
        1, (-1, layer.head_size)
    )
    parts = layer.split(middle.qkv)
    out = attention_backward(
        inner, *parts, middle.kept, where.bounds, where.cos, where.sin, room=qkv.rank
    )  # (T, N + R)

    grad = spread(grad, places, len(x))
    normed = normed_again(qkv, middle.normed_x, x, layer.norm_in, layer.eps)
    qkv.fold(out)
    qkv.accumulate(out, normed, middle.narrow_qkv, where.scratch)
    if not first:
        norm_backward(
            qkv.input_gradient(out, weights(qkv)), x, layer.norm_in, layer.eps, grad[:, :hidden]
        )
    return grad
