"""Terms of a memory ledger, and those that every engine shares.

Legend: see ledger.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from glassloop.predict.shapes import Shapes
from glassloop.predict.tiers import SLOTS, Tiers

PHASES = ("load", "adapters", "forward", "logits", "backward", "optimizer")
GIB = 2**30
LAYERS = ("linear weights", "their scales")  # what streams, of base_bytes
PLANNED_HOST_GIB = 56.0  # that a rank may take on a machine that is not here: one of 64 GiB
NF4_BLOCK, SCALE_BLOCK = 64, 256  # weights a scale, scales a second-level scale
HEAD_CHUNK = 512  # places whose logits are computed at a time: CHUNK_TOKENS of loss.py
SUM_PIECE = 1 << 26  # elements of the flat buffer summed at a time: PIECE of formula/optim.py
STATE_BLOCK = 256  # elements that share one scale in an 8-bit optimizer state
STATE_BYTES = {  # of the optimizer's state, per trainable parameter, in GPU memory
    "adamw_8bit": 2 * (1 + 4 / STATE_BLOCK),
    "paged_adamw_8bit": 2
    * 4
    / STATE_BLOCK,  # the 8-bit moments lie in managed memory, their scales do not
    "adamw": 8.0,
    "sgd": 0.0,
}


@dataclass(frozen=True)
class Work:
    """Facts that decide memory beside the shapes.

    One pass, the adapters, and how they are computed.

    Attributes:
        rows, tokens: rows of a pass and places of each, padding included. A packed pass is one
            row of all its tokens.
        supervised_tokens: supervised places of the pass; None: all.
        r, targets: the adapters; r is the largest.
        trained_tokens: rows of the embedding that train whole.
        capability: of the card; decides the size of cuBLAS's workspaces.
        profile, host_gib, base: memory.*, for the engine `fused`. tiers: what it keeps, and
            where; None: nothing, all without `checkpointing`. host_gib None: auto, of the
            `host_has_gib` that a rank may take of its host in all.
        split: ranks that share each row; a rank has its part of the places.
        between: packed passes whose size the engine `fused` chooses: tokens of the longest row,
            and of a rank's whole share of an update.
        longest_row: data.max_tokens; no packed pass is smaller.
    """

    rows: int
    tokens: int
    r: int
    targets: tuple[str, ...]
    supervised_tokens: int | None = None
    quantization: str = "nf4"
    double_quantization: bool = True
    precision: str = "bf16"
    checkpointing: bool = True
    optimizer: str = "adamw_8bit"
    packed: bool = False
    attention: str = "sdpa"
    reduction: str = "explicit"
    capability: tuple[int, int] = (9, 0)
    profile: str | float = "fill"
    host_gib: float | None = None
    host_has_gib: float = PLANNED_HOST_GIB
    base: str | int = "auto"
    ranks: int = 1
    split: int = 1
    tiers: Tiers | None = None
    between: tuple[int, int] | None = None
    trained_tokens: int = 0
    longest_row: int = 1

    @property
    def places(self) -> int:
        """Places of a rank."""
        return -(-self.rows * self.tokens // self.split)

    @property
    def supervised(self) -> int:
        return (
            self.places
            if self.supervised_tokens is None
            else min(self.supervised_tokens, self.places)
        )

    @property
    def act(self) -> int:
        """Bytes of an activation."""
        return 4 if self.precision == "fp32" else 2


@dataclass(frozen=True)
class Term:
    """One thing that lies in memory, and in which phases."""

    what: str
    size_bytes: int
    phases: tuple[str, ...]


@dataclass(frozen=True)
class Ledger:
    """Terms, and what they add up to in each phase."""

    engine: str
    terms: tuple[Term, ...]

    @property
    def phases(self) -> dict[str, int]:
        """Phase -> bytes, in order, with "peak" last."""
        sums = {
            phase: sum(term.size_bytes for term in self.terms if phase in term.phases)
            for phase in PHASES
        }
        return {**sums, "peak": max(sums.values())}

    @property
    def peak_bytes(self) -> int:
        return self.phases["peak"]


def base_bytes(shapes: Shapes, work: Work) -> dict[str, int]:
    """The frozen base: linear weights, scales, and the 16-bit rest."""
    n = shapes.linear_weights
    blocks = n // NF4_BLOCK
    nested = blocks + 4 * -(
        -blocks // SCALE_BLOCK
    )  # one byte a scale, and a second-level fp32 scale for every 256
    linear = n // 2 if work.quantization == "nf4" else n * work.act
    scales = 0 if work.quantization != "nf4" else nested if work.double_quantization else 4 * blocks
    rest = shapes.embedding_weights + shapes.head_weights + shapes.norm_weights
    return {
        "linear weights": linear,
        "their scales": scales,
        "embedding, head, norms": rest * work.act,
    }


def layer_bytes(shapes: Shapes, work: Work) -> int:
    """Bytes of one layer's quantised weights and scales."""
    parts = base_bytes(shapes, work)
    return sum(parts[what] for what in LAYERS) // shapes.layers


def tiers_of(shapes: Shapes, work: Work) -> Tiers:
    """Tiers of `fused` for this work; without a choice, the defaults."""
    if not work.checkpointing:
        return Tiers(shapes.layers, streamed=work.tiers.streamed if work.tiers else 0)
    return work.tiers or Tiers(0)


def workspace_bytes(capability: tuple[int, int]) -> int:
    """cuBLAS's workspaces.

    torch allocates them once for the thread of the forward pass and once for that of the backward
    pass.
    """
    return 2 * (32 << 20 if capability[0] >= 9 else (8 << 20) + (128 << 10))


def resident(shapes: Shapes, work: Work) -> tuple[Term, ...]:
    """Memory that every engine holds for the whole run."""
    n = shapes.lora_weights(work.r, work.targets) + work.trained_tokens * shapes.hidden
    after_load = PHASES[1:]
    base = base_bytes(shapes, work)
    moved = (
        shapes.embedding_weights * work.act
        if work.tiers and work.tiers.host != "nothing" and not shapes.tied_head
        else 0
    )
    base["embedding, head, norms"] -= moved
    before_it_goes = PHASES[:1] if work.profile == "min" else PHASES[:2]
    streamed = work.tiers.streamed if work.tiers else 0
    for what in LAYERS:
        base[what] -= base[what] * streamed // shapes.layers
    one = layer_bytes(shapes, work)
    part = one * -(-shapes.layers // work.ranks) if work.base == "sharded" else 0
    return (
        *(Term(what, size, PHASES) for what, size in base.items()),
        Term("room for streamed layers", min(SLOTS, streamed) * one, PHASES),
        Term("this rank's part of the layers", part, PHASES),
        Term("embedding, before it goes to the host", moved, before_it_goes),
        Term("adapters, fp32", 4 * n, after_load),
        Term("their gradients, fp32", 4 * n, after_load),
        Term("DDP's buckets", 4 * n if work.reduction == "ddp" else 0, PHASES[2:]),
        Term(f"state of {work.optimizer}", round(STATE_BYTES[work.optimizer] * n), PHASES[2:]),
        Term("cuBLAS workspaces", workspace_bytes(work.capability), PHASES[2:]),
        # Norm and checksum of the flat buffer are summed in float64 and int64, of a copy in pieces.
        Term("norm and checksum, 8-byte copy of a piece", 8 * min(n, SUM_PIECE), ("optimizer",)),
    )
