"""FLOPs of an update of LoRA on a frozen base, from shapes.

What the mathematics asks for and what is computed twice are counted apart. A matrix product of (m,
k) and (k, n) is 2 m k n FLOPs; nothing else is counted. Frozen weights need no gradient of their
own: a linear layer costs its forward and the gradient of its input. The embedding is frozen too, so
nothing needs the gradient of the first layer's input, and the products that would only serve it are
not there.

Legend: H hidden size, V vocabulary, T tokens of a row, R rank of the adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from glassloop.predict.shapes import Shapes
from glassloop.predict.tiers import Host

STAGES = (
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj",),
    ("gate_proj", "up_proj"),
    ("down_proj",),
)  # of a layer, in order; one input each


@dataclass(frozen=True)
class Flops:
    """FLOPs by purpose.

    `model` is what any implementation must compute; `recompute` what one may do a second time to
    save memory.
    """

    linear: float  # frozen linear layers, forward and input gradients
    adapters: float  # forward, input gradients and the gradients of A and B
    attention: float  # scores and weighted values, both ways, over the places that a place may see
    head: float  # at supervised places, forward and input gradients
    recompute: float  # layers' forward once more, without the head; 0 where activations are stored

    @property
    def model(self) -> float:
        return self.linear + self.adapters + self.attention + self.head

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            *(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )


def flops_of(
    shapes: Shapes,
    rows: Iterable[tuple[int, int]],
    *,
    r: int,
    targets: Sequence[str],
    checkpointing: bool,
    causal: bool = True,
    kept: int | None = None,
    host: Host = "nothing",
) -> Flops:
    """FLOPs of forward and backward over `rows`.

    Args:
        rows: (tokens, supervised tokens) of each. Real lengths count what is needed; padded
            lengths what a padded layout computes.
        checkpointing: each decoder layer is computed again in the backward pass.
        kept: layers that the engine `fused` keeps whole; it computes the others again without
            down_proj. None: another engine.
        host: what those left on the host, and is not computed again either: attention, or that
            and o_proj.
        causal: a place sees itself and those before it; False: every place of its row, as
            attention without a causal kernel computes it.
    """
    tokens = supervised = pairs = 0
    for length, labels in rows:
        tokens, supervised = tokens + length, supervised + labels
        pairs += length * (length + 1) // 2 if causal else length * length
    linear = tokens * 2 * shapes.linear_weights  # forward; as much again for input gradients
    adapters = (
        tokens * 2 * shapes.lora_weights(r, targets)
    )  # forward; as much for input gradients, and for the gradients of A and B
    attention = (
        shapes.layers * 2 * 2 * pairs * shapes.q_width
    )  # two products, forward; backward, a gradient of each factor
    skipped, skipped_adapters = _before_any_adapter(shapes, r, targets)
    again = linear + adapters + attention if checkpointing else 0
    if kept is not None:
        known = ("o_proj", "down_proj") if host == "all" else ("down_proj",)
        again = (
            linear
            + adapters
            + (0 if host in ("attention", "all") else attention)
            - tokens * 2 * shapes.layers * _weights(shapes, r, targets, known)
        )
        again = again * (shapes.layers - kept) // shapes.layers
        if (
            kept == 0
        ):  # the last layer's, which needs what follows attention at supervised places alone
            after = ("gate_proj", "up_proj")
            after = after if host == "all" else ("o_proj", *after)
            again -= (tokens - supervised) * 2 * _weights(shapes, r, targets, after)
    q, k, v = (name in targets for name in STAGES[0])
    needed = v + (q or k) + q + k  # of the four products of the first layer's attention backward
    return Flops(
        linear=2 * linear - tokens * 2 * skipped,
        adapters=3 * adapters - tokens * 2 * skipped_adapters,
        attention=3 * attention - attention // shapes.layers * (4 - needed) // 2,
        head=supervised * 4 * shapes.embedding_weights,
        recompute=again,
    )


def _weights(shapes: Shapes, r: int, targets: Sequence[str], names: Sequence[str]) -> int:
    """Of these projections of a layer, adapters included."""
    widths = [(name, *shapes.projections[name]) for name in names]
    return sum(
        inner * outer + (r * (inner + outer) if name in targets else 0)
        for name, inner, outer in widths
    )


def _before_any_adapter(shapes: Shapes, r: int, targets: Sequence[str]) -> tuple[int, int]:
    """Weights of the first layer that no gradient passes through.

    Frozen ones and those of adapters: nothing before them is trained.
    """
    frozen = adapters = 0
    for stage in STAGES:
        frozen += sum(inner * outer for inner, outer in map(shapes.projections.__getitem__, stage))
        # An adapter's input gradient is the product with A. The one with B serves A's own gradient.
        adapters += sum(r * shapes.projections[name][0] for name in stage if name in targets)
        if any(name in targets for name in stage):
            break
    return frozen, adapters
