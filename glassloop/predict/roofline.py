"""Predicted tokens a second by card.

A pass takes the time of its arithmetic and memory traffic, or of its host if that is longer.
Nothing here is measured on the run's own machine. Rates are those that large bf16 matrix products
and copies reached on each card, not data sheets. time_checks.py holds the runs that the prediction
was compared with. fused_time.py has the engine `fused`.

Legend: H hidden size, I intermediate size, V vocabulary, L layers, T real or padded places of a
pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from glassloop.predict.shapes import Shapes

ALL_SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight, with double quantisation
# Host time of a pass through `peft`, a layer: forward, recomputation and backward launch some
# hundred kernels from Python. From short rows on an H200 (8 passes of 32 layers in 4.4 s); another
# CPU will differ.
HOST_S_PER_LAYER = 0.0172
# The same for `fused`, whose passes launch a tenth as much: forward and backward of a layer that is
# kept, and what recomputing it adds. From the short padded passes of time_checks.py, on the H100's
# host.
FUSED_HOST_S_PER_LAYER, FUSED_HOST_S_PER_RECOMPUTED = 0.0044, 0.0018
OVERHEAD_S_PER_UPDATE = 0.05  # norm, gate, optimizer, records


@dataclass(frozen=True)
class Rates:
    """Rates that a card sustains.

    bf16 matrix products, copies (bytes/s), attention forward and backward, and copies from
    page-locked host memory (bytes/s).
    """

    matmul: float
    copy: float
    attention: float
    attention_backward: float
    link: float


# A slot with 16 lanes, bytes/s. PCIe 5 was measured on an H200: 55 GB/s alone, 47 in both
# directions at once. PCIe 4 is half of that less a margin. `glassloop doctor` measures yours.
PCIE4, PCIE5 = 24e9, 50e9
RATES = {
    "3090": Rates(75e12, 0.85e12, 50e12, 35e12, PCIE4),
    "4090": Rates(162e12, 0.92e12, 95e12, 75e12, PCIE4),
    "A100-40": Rates(262e12, 1.35e12, 180e12, 130e12, PCIE4),
    "A100-80": Rates(262e12, 1.70e12, 180e12, 130e12, PCIE4),
    "H100": Rates(760e12, 3.0e12, 225e12, 200e12, PCIE5),
    "H200": Rates(760e12, 4.3e12, 225e12, 200e12, PCIE5),
}


# cuDNN's attention serves rows of one length on Hopper. Its rates grow with a row's tokens T as
# T / (T + LONG_HALF), up to these FLOP/s of forward and backward. Fitted to three long rows.
LONG = {"H100": (630e12, 545e12), "H200": (630e12, 545e12)}
LONG_HALF = 4096.0


def attention_rates(card: str, row_tokens: float) -> tuple[float, float]:
    """FLOP/s of attention, forward and backward, by length of rows."""
    rates = RATES[card]
    share = row_tokens / (row_tokens + LONG_HALF)
    forward, backward = (share * most for most in LONG.get(card, (0.0, 0.0)))
    return max(rates.attention, forward), max(rates.attention_backward, backward)


@dataclass(frozen=True)
class PassTime:
    """Seconds of one pass on one rank.

    `seconds` is the longer of the two, since the GPU works while the host launches.
    """

    gpu_s: float
    host_s: float
    waits_s: float = 0.0  # part of gpu_s: the GPU waits for its host

    @property
    def seconds(self) -> float:
        return max(self.gpu_s, self.host_s)

    @property
    def host_bound(self) -> bool:
        return self.host_s > self.gpu_s


def pass_time(
    shapes: Shapes,
    card: str,
    *,
    rows: float,
    row_tokens: float,
    supervised_share: float = 1.0,
    r: int = 16,
    targets: Sequence[str] = ALL_SEVEN,
    quantized: bool = True,
    checkpointing: bool = True,
) -> PassTime | None:
    """One forward and backward pass of `peft` in bf16 or fp16.

    None for a card whose rates are not known.
    """
    rates = RATES.get(card)
    if rates is None:
        return None
    places, again = rows * row_tokens, int(checkpointing)
    efficiency = 0.95 if places >= 2048 else 0.8  # of the rate of large square products
    adapters = shapes.lora_weights(r, targets)
    head = shapes.embedding_weights
    flop = (
        2
        * places
        * (
            shapes.linear_weights * (2 + again)
            + head * 2 * supervised_share
            + adapters * (3 + again)
        )
    )
    # Causal attention, forward: 2 products of (row_tokens / 2) x head_dim for every place and head,
    # 2 FLOP each.
    attention = shapes.layers * 2 * row_tokens * shapes.q_width * places
    attention_s = (
        attention * (1 + again) / rates.attention + 2.5 * attention / rates.attention_backward
    )
    # Dequantisation reads 4 bits and writes 16 for each weight, and its scales, once a product.
    dequantize = (NF4_BYTES + 2.25) * shapes.linear_weights * (2 + again) if quantized else 0.0
    elementwise = (
        elementwise_bytes(shapes, targets) * places * shapes.layers * (3 + again)
    )  # backward counts twice
    logits = 8 * places * supervised_share * shapes.vocabulary
    gpu = (
        flop / (rates.matmul * efficiency)
        + attention_s
        + (dequantize + elementwise + logits) / rates.copy
    )
    return PassTime(gpu, HOST_S_PER_LAYER * shapes.layers * (2 + again) / 3)


def elementwise_bytes(shapes: Shapes, targets: Sequence[str]) -> int:
    """Bytes of a layer's forward traffic outside of matrix products.

    Read and written, for one place.
    """
    norms_and_residuals = (
        20 * shapes.hidden
    )  # each norm reads and writes once, each residual sum reads twice and writes once
    rope = 20 * (shapes.q_width + shapes.kv_width)
    swiglu = 10 * shapes.intermediate
    widths = [shapes.projections[target] for target in targets]
    # An adapter reads x; its output is scaled, the base's copied, and both added.
    adapters = sum(2 * inner + 16 * outer for inner, outer in widths)
    return norms_and_residuals + rope + swiglu + adapters


def tokens_per_s(
    one: PassTime, *, rows: float, row_tokens: float, passes: float, ranks: int
) -> float:
    """Of all ranks together, over whole updates of `passes` passes a rank."""
    return ranks * passes * rows * row_tokens / (passes * one.seconds + OVERHEAD_S_PER_UPDATE)
