"""Parts of a layer, and what it leaves for backward.

Legend: T tokens, S places where the output is wanted, H hidden size, I intermediate size, D head
size, N rows of a group's weights, R columns of its adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from glassloop.engines.fused.attention import Bounds, Kept
from glassloop.engines.fused.exchange import Exchange
from glassloop.engines.fused.linear import Linear, Scratch
from glassloop.engines.fused.rotary import Angles
from glassloop.plan.described import Described, Kind
from glassloop.predict.tiers import Group, Sizes


@dataclass(frozen=True)
class Layer:
    """One layer's frozen weights and adapters, and its description.

    A norm's weight is what it multiplies by, the added one included; None: there is no such norm.
    """

    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear
    norm_in: Tensor | None  # (H,), as the next three
    norm_after_o: Tensor | None
    norm_mid: Tensor | None
    norm_after_down: Tensor | None
    norm_qk: tuple[Tensor, Tensor] | None  # (D,) each, or (heads * D,) and (key heads * D,)
    of: Described
    kind: Kind

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.qkv, self.o, self.gate_up, self.down

    @property
    def turned(self) -> int:
        """Columns of q and k, which carry positions."""
        return (self.of.heads + self.of.key_heads) * self.of.head_size

    @property
    def sizes(self) -> Sizes:
        """Sizes that memory is counted from."""
        groups = (Group(one.rows, one.columns, one.rank) for one in self.linears)
        return Sizes(
            *groups,
            heads=self.of.heads,
            element=self.qkv.a.element_size(),
            turned=0 if self.norm_qk is None else self.turned,
            after_o=self.norm_after_o is not None,
            after_down=self.norm_after_down is not None,
        )

    def split(self, qkv: Tensor, turned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views (T, heads, D), (T, key heads, D) twice.

        qkv: (T, N), for v. turned: (T, columns of q and k).
        """
        queries = self.of.heads * self.of.head_size
        parts = turned[:, :queries], turned[:, queries:], qkv[:, self.turned :]
        return tuple(t.unflatten(1, (-1, self.of.head_size)) for t in parts)  # type: ignore[return-value]


def largest(layers: Sequence[Layer]) -> Sizes:
    """Sizes of a layer that has every group's largest rank."""
    found = [one.sizes for one in layers]
    most = {
        group: max((getattr(one, group) for one in found), key=lambda group: group.rank)
        for group in ("qkv", "o", "gate_up", "down")
    }
    return replace(found[0], **most)


@dataclass(frozen=True)
class Where:
    """Bounds, angles and scratch for all layers of a pass.

    Bounds by window, angles by frequencies. `exchange`: with the ranks that share the pass; None: a
    rank alone. Bounds are of all places then, angles of this rank's.
    """

    bounds: Mapping[int | None, Bounds]
    angles: Mapping[str | None, Angles]
    scratch: Scratch
    exchange: Exchange | None = None


@dataclass(frozen=True)
class Middle:
    """Tensors between a layer's input and its last product."""

    qkv: Tensor  # (T, N): q and k turned by their positions, unless a norm stands on them
    kept: Kept
    product: Tensor | None  # (T, H): of W_o, where a norm follows it
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
    mid: Tensor | None  # (T, H): m, or the product of W_o where a norm follows it
    narrow_o: Tensor | None  # (T, R)


@dataclass(frozen=True)
class Saved:
    """A layer's own memory between forward and backward."""

    x: Tensor  # (T, H)
    narrow_down: Tensor  # (T, R)
    product: Tensor | None  # (T, H): of W_down, where a norm follows it
    middle: Middle | None  # None: to be computed again
    attended: Attended | None  # None: this too, or it is part of `middle`
    # (S,) int64: where the output was wanted; the middle's gate and what follows have S rows then.
    places: Tensor | None


def part(saved: Saved) -> tuple[Saved, tuple[Tensor, ...]]:
    """Split what a recomputed layer left into small and large tensors.

    The large ones are x (T, H), the product of W_down if it is kept, and, as far as they are kept,
    attention's output (T, heads * D) and m or the product of W_o.
    """
    none, attended = saved.x.new_empty(0), saved.attended
    large = (saved.x,) if saved.product is None else (saved.x, saved.product)
    small = replace(saved, x=none, product=None if saved.product is None else none)
    if attended is None:
        return small, large
    large = (*large, attended.kept.out.flatten(1))
    kept = replace(attended.kept, out=none)
    if attended.mid is not None:
        large = (*large, attended.mid)
        attended = replace(attended, mid=none)
    return replace(small, attended=replace(attended, kept=kept)), large


def join(layer: Layer, saved: Saved, large: Sequence[Tensor]) -> Saved:
    """The two together again."""
    x, *rest = large
    product = None if saved.product is None else rest.pop(0)
    attended = saved.attended
    if attended is not None:
        kept = replace(attended.kept, out=rest[0].unflatten(1, (-1, layer.of.head_size)))
        attended = replace(attended, kept=kept, mid=rest[1] if len(rest) > 1 else None)
    return replace(saved, x=x, product=product, attended=attended)


def chosen(t: Tensor, places: Tensor | None) -> Tensor:
    """Rows of t (T, ...) at places (S,), or all of them."""
    return t if places is None else t.index_select(0, places)


def spread(t: Tensor, places: Tensor | None, tokens: int) -> Tensor:
    """The reverse of `chosen`: t's rows at places, else 0.

    (T, ...) of t (S, ...).
    """
    return t if places is None else t.new_zeros(tokens, *t.shape[1:]).index_copy_(0, places, t)
