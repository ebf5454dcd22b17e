"""Memory tiers of the engine `fused`, from shapes alone.

A layer's activations wait for backward whole; or its input alone does, and the layer is computed
again; or that input waits on the host. Then weights may be held in 16 bits beside the 4-bit ones.
Every choice gives the same gradient.

Legend: H hidden size, I intermediate size, N and K rows and columns of a group's weights, R columns
of its adapters, T slot tokens of a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from glassloop.predict.shapes import Shapes

GIB = 2**30
FRAGMENTATION = 0.03  # of the memory in use: what an allocator holds in pieces that fit nothing
SPARE_BYTES = 512 * 2**20  # for what is not counted: libraries' workspaces, evaluation
SLOTS = 2  # room on the GPU for layers on their way: one at work, one that is copied meanwhile
ALIGNMENT = 16  # R is rounded up to it
HEAD_CHUNK = 1024  # places whose logits are computed at a time
MOST_PASS_TOKENS = (
    32768  # of a pass whose size is chosen: dequantisation and launches are about 1 % of it by then
)
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
        host: the large tensors of the others (input, attention's output, middle), and the
            embedding, lie in pinned host memory.
        held: how many layers, from the first up, hold their weights in 16 bits beside the 4-bit
            ones.
        streamed: how many layers, from the first up, have their 4-bit weights on the host.
    """

    kept: int
    host: bool
    held: int = 0
    streamed: int = 0


def sizes_of(shapes: Shapes, r: int, targets: Sequence[str], element: int) -> Sizes:
    """A layer of these shapes with adapters of rank r on `targets`."""

    def group(*names: str) -> Group:
        used = r * sum(name in targets for name in names) + any(
            name in shapes.biased for name in names
        )
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


def input_bytes(one: Sizes, tokens: int) -> int:
    """Bytes of a layer that keeps its input alone.

    And the narrow product of down_proj, which is not computed again, with the whole one if a norm
    follows it.
    """
    return tokens * one.element * (one.qkv.columns * (1 + one.after_down) + one.down.rank)


def away_bytes(one: Sizes, tokens: int) -> int:
    """Bytes of a layer on the host: input, attention's output, middle.

    And the product of down_proj if a norm follows it.
    """
    return tokens * one.element * ((2 + one.after_down) * one.qkv.columns + one.o.columns)


def beside_away_bytes(one: Sizes, tokens: int) -> int:
    """Bytes of such a layer that stay on the GPU.

    Narrow products of o_proj and down_proj, attention's log-sum-exp.
    """
    return tokens * (one.element * (one.o.rank + one.down.rank) + 4 * one.heads)


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
    return element * (min(HEAD_CHUNK, places) * vocabulary + 5 * places * hidden)


@dataclass(frozen=True)
class Base:
    """The 4-bit weights that can stream from the host.

    Attributes:
        asked: memory.base: auto, gpu, host, a number of layers on the GPU, or GiB as "12GiB".
        layer_bytes: of one layer's weights. slots: room on the GPU for layers on their way.
    """

    asked: str | int
    layer_bytes: int
    slots: int = SLOTS

    def streamed(self, layers: int) -> int | None:
        """Number of layers that stream as asked; None: as few as needed."""
        if self.asked in ("gpu", "host"):
            return layers if self.asked == "host" else 0
        if isinstance(self.asked, int):
            return max(0, layers - self.asked)
        if self.asked.endswith("GiB"):
            budget = int(float(self.asked.removesuffix("GiB")) * GIB)
            return max(0, layers - budget // self.layer_bytes)
        return None

    def bytes(self, layers: int, streamed: int) -> int:
        """On the GPU, slots included."""
        return (layers - streamed + min(self.slots, streamed)) * self.layer_bytes


def choose(
    profile: str | float,
    one: Sizes,
    layers: int,
    *,
    tokens: int,
    used: int,
    free: int,
    head_bytes: int,
    host_bytes: int,
    base: Base | None = None,
) -> Tiers:
    """The tiers of a profile.

    Args:
        profile: min: as little as possible. fill: as much as there is. A number: GiB of the GPU
            that may be used in all.
        one, layers: a layer, and how many there are.
        tokens: slot tokens of the heaviest pass.
        used, free: bytes of the GPU that are taken and that could be taken yet; without any of the
            4-bit weights where `base` is given.
        head_bytes: what the head's loss takes while no layer computes.
        host_bytes: pinned memory that may be taken for layers' large tensors.
        base: 4-bit weights that may stream; None: they are part of `used`.

    Returns:
        The tiers; where not even the smallest fit the budget, the smallest.
    """
    inputs = layers * input_bytes(one, tokens)
    fits_host = host_bytes >= layers * away_bytes(one, tokens)
    budget = used + free if profile in ("min", "fill") else int(float(profile) * GIB)
    most = min(budget, used + free) * (1 - FRAGMENTATION) - used - SPARE_BYTES
    most -= max(live_bytes(one, tokens), head_bytes)  # beyond what layers keep
    more = kept_bytes(one, tokens) - input_bytes(one, tokens)
    streamed = 0
    if base is not None:
        asked = base.streamed(layers)
        beside = layers * beside_away_bytes(one, tokens) + 2 * away_bytes(one, tokens)
        least = more + min(inputs, beside if fits_host else inputs)
        fewest = (s for s in range(layers) if most - base.bytes(layers, s) >= least)
        streamed = next(fewest, layers) if asked is None else asked
        most -= base.bytes(layers, streamed)
    most -= inputs
    if profile == "min":  # one layer is kept or computed again: its memory is the same
        return Tiers(min(1, layers), fits_host, streamed=streamed)
    if most >= layers * more:
        held = min(layers, int((most - layers * more) // held_bytes(one)))
        return Tiers(layers, False, held=0 if streamed else held, streamed=streamed)
    kept = int(most // more)  # their memory is free when the first of the others is computed again
    if kept >= 1:
        return Tiers(kept, False, streamed=streamed)
    return Tiers(min(1, layers), fits_host, streamed=streamed)


def describe(tiers: Tiers, layers: int) -> str:
    """Tiers in words: "12 of 32 layers kept, ...".

    For example "12 of 32 layers kept, inputs of the others on the GPU".
    """
    told = [f"{tiers.kept} of {layers} layers kept"]
    if tiers.kept < layers:
        told.append(
            "inputs and attention of the others on the host"
            if tiers.host
            else "inputs of the others on the GPU"
        )
    if tiers.streamed:
        told.append(f"4-bit weights of {tiers.streamed} streamed from the host")
    if tiers.held:
        told.append(f"weights of {tiers.held} held in 16 bits")
    return ", ".join(told)
