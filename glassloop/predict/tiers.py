"""Memory tiers of the engine `fused`, from shapes alone.

A layer's activations wait for backward whole; or its input alone does, and the layer is computed
again; or that input waits on the host, alone or with results that are then not computed again.
Memory that is left holds weights in 16 bits beside the 4-bit ones. Every choice gives the same
gradient.

Legend: H hidden size, I intermediate size, N and K rows and columns of a group's weights, R columns
of its adapters, T slot tokens of a pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from glassloop.predict.shapes import Shapes
from glassloop.predict.traits import JOINED

GIB = 2**30
FRAGMENTATION = 0.03  # of the memory in use: what an allocator holds in pieces that fit nothing
SPARE_BYTES = 512 * 2**20  # for what is not counted: libraries' workspaces, evaluation
SLOTS = 2  # room on the GPU for layers on their way: one at work, one that is copied meanwhile
ALIGNMENT = 16  # R is rounded up to it
HEAD_CHUNK = 1024  # places whose logits are computed at a time
MOST_PASS_TOKENS = (
    32768  # of a pass whose size is chosen: dequantisation and launches are about 1 % of it by then
)
PAGE = 4096  # bytes; a layer's slot on the host is a multiple
# Large tensors of a recomputed layer that wait on the host: its input; that and attention's output;
# both and the middle, after which nothing before the gate but q, k and v is computed again.
Host = Literal["nothing", "inputs", "attention", "all"]
HOSTS: tuple[Host, ...] = get_args(Host)  # from the least host memory to the most
AWAY = HOSTS[1:]
# Tokens. A pass's size is a multiple, so that a few MiB more or less free give the same one.
PASS_STEP = 256


@dataclass(frozen=True)
class Group:
    """Weights that share an input, one below the other.

    (N, K), with R columns of adapters.
    """

    rows: int
    columns: int
    rank: int

    @property
    def folded(self) -> tuple[int, int]:
        """Shape of the weights with the adapters beside and below them."""
        return self.rows + self.rank, self.columns + self.rank


@dataclass(frozen=True)
class Sizes:
    """Sizes of one layer.

    Its groups, query heads, and bytes of an element in 16 bits (4 in fp32).

    Attributes:
        turned: columns of q and k that stand beside their product, where a norm is on them; else 0.
        after_o, after_down: a norm follows that product, which is kept for it.
    """

    qkv: Group
    o: Group
    gate_up: Group
    down: Group
    heads: int
    element: int
    turned: int = 0
    after_o: bool = False
    after_down: bool = False

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.qkv, self.o, self.gate_up, self.down


@dataclass(frozen=True)
class Tiers:
    """Treatment of each layer of the heaviest pass.

    Attributes:
        kept: how many layers, from the last one down, keep all that backward needs.
        host: what the others leave in page-locked host memory; the embedding lies there too, unless
            it is "nothing".
        held: how many layers, from the first up, hold their weights in 16 bits beside the 4-bit
            ones.
        streamed: how many layers, from the first up, have their 4-bit weights on the host.
        chunk: places that a layer's products take at a time, in longer passes; no layer is kept
            then. 0: all.
    """

    kept: int
    host: Host = "nothing"
    held: int = 0
    streamed: int = 0
    chunk: int = 0

    def __post_init__(self) -> None:
        assert self.host in HOSTS, f"host = {self.host!r}, not one of {', '.join(HOSTS)}"
        assert not (self.chunk and self.kept), "a layer that is kept has all places at once"

    @staticmethod
    def of(recorded: Mapping[str, Any]) -> Tiers:
        """Tiers as a checkpoint has them.

        Before 0.2 `host` was true or false.
        """
        known = {one.name for one in fields(Tiers)}
        found = {name: value for name, value in recorded.items() if name in known}
        if isinstance(found["host"], bool):
            found["host"] = "all" if found["host"] else "nothing"
        return Tiers(**found)

    def no_more_than(self, other: Tiers) -> bool:
        """True if memory that has room for `other` has room for these."""
        if (self.host == "nothing") != (other.host == "nothing"):
            return other.host == "nothing"
        most = [(one.chunk or 1 << 62, HOSTS.index(one.host)) for one in (self, other)]
        less = all(a <= b for a, b in zip(*most, strict=True))
        return less and (self.kept, self.held) <= (other.kept, other.held)


def sizes_of(shapes: Shapes, r: int, targets: Sequence[str], element: int) -> Sizes:
    """A layer of these shapes with adapters of rank r on `targets`."""

    joined = {part for name in shapes.traits.joined for part in JOINED[name]}

    def group(*names: str) -> Group:
        reached = sum(name in targets for name in names)
        adapters = min(reached, 1) if names[0] in joined else reached
        used = r * adapters + any(name in shapes.biased for name in names)
        inner = shapes.projections[names[0]][0]
        return Group(
            sum(shapes.projections[name][1] for name in names),
            inner,
            -(-used // ALIGNMENT) * ALIGNMENT,
        )

    return Sizes(
        group("q_proj", "k_proj", "v_proj"),
        group("o_proj"),
        group("gate_proj", "up_proj"),
        group("down_proj"),
        shapes.heads,
        element,
        turned=shapes.q_width + shapes.kv_width if shapes.traits.heads else 0,
        after_o=shapes.traits.after,
        after_down=shapes.traits.after,
    )


def kept_bytes(one: Sizes, tokens: int) -> int:
    """Bytes of a layer that keeps all that backward needs.

    Input, q, k, v, attention's output and log-sum-exp, middle, gate and up, narrow products.
    """
    columns = (
        3 * one.qkv.columns + one.qkv.rows + one.gate_up.rows + 2 * one.gate_up.rank + one.qkv.rank
    )
    columns += one.qkv.columns * (one.after_o + one.after_down)
    return tokens * (one.element * (columns + one.o.rank + one.down.rank) + 4 * one.heads)


def last_kept_bytes(one: Sizes, tokens: int, places: int) -> int:
    """Bytes of the last layer, kept whole.

    It computes what follows attention at supervised places alone.
    """
    whole = (
        one.element * (one.qkv.columns + one.qkv.rows + one.o.columns + one.qkv.rank)
        + 4 * one.heads
    )
    after = one.o.rank + one.qkv.columns + one.gate_up.rows + 2 * one.gate_up.rank + one.down.rank
    after += one.qkv.columns * (one.after_o + one.after_down)
    return tokens * whole + places * one.element * after


def index_bytes(tokens: int) -> int:
    """Of a pass's ids, targets, positions and owners."""
    return 32 * tokens


def turn_bytes(one: Sizes, tokens: int) -> int:
    """Of the cosines and sines of a pass."""
    return 2 * one.element * tokens * (one.o.columns // one.heads)


def input_bytes(one: Sizes, tokens: int) -> int:
    """Bytes of a layer that keeps its input alone.

    And the narrow product of down_proj, which is not computed again, with the whole one if a norm
    follows it.
    """
    return tokens * one.element * (one.qkv.columns * (1 + one.after_down) + one.down.rank)


def away_widths(one: Sizes, host: Host) -> tuple[int, ...]:
    """Columns of a layer's large tensors on the host, in order.

    The product of down_proj lies beside the input if a norm follows it.
    """
    hidden = one.qkv.columns
    inputs = (hidden,) * (1 + one.after_down)
    parts = inputs, (one.o.columns,), (hidden,)
    return tuple(width for part in parts[: HOSTS.index(host)] for width in part)


def away_bytes(one: Sizes, tokens: int, host: Host) -> int:
    """Bytes of a layer on the host."""
    return tokens * one.element * sum(away_widths(one, host))


def slot_bytes_of(size: int) -> int:
    """A slot of the host for `size` bytes: whole pages."""
    return -(-size // PAGE) * PAGE


def room_bytes(one: Sizes, tokens: int, layers: int, host: Host) -> int:
    """Bytes of the host that large tensors of these layers take."""
    return layers * slot_bytes_of(away_bytes(one, tokens, host))


def beside_away_bytes(one: Sizes, tokens: int, host: Host) -> int:
    """Bytes of such a layer that stay on the GPU.

    The narrow product of down_proj; attention's log-sum-exp, beside its output; and the narrow
    product of o_proj, beside the middle.
    """
    attention = 4 * one.heads if host in ("attention", "all") else 0
    narrow = one.down.rank + (one.o.rank if host == "all" else 0)
    return tokens * (one.element * narrow + attention)


def held_bytes(one: Sizes) -> int:
    """Of a layer's weights in 16 bits, adapters beside them."""
    return sum(
        rows * columns * one.element for rows, columns in (group.folded for group in one.groups)
    )


def live_bytes(one: Sizes, tokens: int) -> int:
    """Most bytes at one time within a layer's backward.

    Beyond what the layer keeps: the MLP's gradient, or attention's, and normed inputs.
    """
    hidden = one.qkv.columns
    normed = hidden + one.qkv.rank + one.gate_up.rank
    mlp = one.down.columns + 4 * hidden
    attention = (
        2 * hidden + one.qkv.rows + 4 * one.o.columns
    )  # as torch's flash kernel does; ours takes less
    attention += one.turned
    mlp += hidden * one.after_down  # gradient of the product before its norm
    return tokens * one.element * (normed + max(mlp, attention))


def gradient_bytes(one: Sizes, tokens: int) -> int:
    """Bytes of the gradient of a layer's output, adapters' room included."""
    return one.element * tokens * (one.qkv.columns + max(one.o.rank, one.down.rank))


def shadow_bytes(one: Sizes) -> int:
    """Bytes of a layer's rounded adapters.

    A (R, K) and B (N, R) of each group.
    """
    return sum(one.element * group.rank * (group.rows + group.columns) for group in one.groups)


def scratch_bytes(one: Sizes) -> int:
    """Bytes of the matrices for the weights of the layer at work.

    One a group.
    """
    return held_bytes(one)


def product_bytes(one: Sizes) -> int:
    """Of the room in fp32 for the gradients of a layer's adapters."""
    return sum(4 * g.rank * (g.rows + g.columns) for g in one.groups)


def head_bytes(vocabulary: int, hidden: int, places: int, element: int) -> int:
    """Most bytes of the loss, for `places` supervised tokens."""
    return element * (min(HEAD_CHUNK, places) * vocabulary + 2 * places * hidden)
