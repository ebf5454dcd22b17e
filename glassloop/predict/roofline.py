"""Predicted tokens a second by card.

A pass takes the time of its arithmetic and memory traffic, or of its host if that is longer.
Nothing here is measured on the run's own machine. Rates are those that large bf16 matrix products
and copies reached on each card, not data sheets. CHECKED holds the runs that the prediction was
compared with; cards without one have never been checked.

Legend: H hidden size, I intermediate size, V vocabulary, L layers, T real or padded places of a
pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from glassloop.predict.shapes import KNOWN, Shapes

ALL_SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight, with double quantisation
# Host time of a pass through `peft`, a layer: forward, recomputation and backward launch some
# hundred kernels from Python. From short rows on an H200 (8 passes of 32 layers in 4.4 s); another
# CPU will differ.
HOST_S_PER_LAYER = 0.0172
# The same for `fused`, whose passes launch a tenth as much: forward and backward of a layer that is
# kept, and what recomputing it adds. From the short padded passes of FUSED_CHECKED, on the H100's
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


@dataclass(frozen=True)
class PassTime:
    """Seconds of one pass on one rank.

    `seconds` is the longer of the two, since the GPU works while the host launches.
    """

    gpu_s: float
    host_s: float
    waits_s: float = 0.0  # part of gpu_s: the GPU waits for layers from the host

    @property
    def seconds(self) -> float:
        return max(self.gpu_s, self.host_s)

    @property
    def host_bound(self) -> bool:
        return self.host_s > self.gpu_s


@dataclass(frozen=True)
class Check:
    """A run that was measured, and what is predicted of it."""

    what: str
    card: str
    rows: int
    row_tokens: float
    ranks: int
    measured_tokens_per_s: float  # all ranks together; real tokens
    kept: int = 0  # layers kept whole, engine `fused`
    passes: int = 0  # of an update on a rank; 0: 16 rows an update, `rows` a pass
    padded: float = 1.0  # places over real tokens


SCAM_ROW_TOKENS = 350.0
CHECKED = (
    Check("2 x 2,048 tokens a pass, 1 rank", "H100", 2, 2048, 1, 6413),
    Check("2 short rows a pass, 1 rank", "H200", 2, SCAM_ROW_TOKENS, 1, 1277),
    Check("2 short rows a pass, 2 ranks", "H200", 2, SCAM_ROW_TOKENS, 2, 2999),
)
# `fused`: updates of 8 full rows or 16 short ones, optimizer's step included (torch 2.11, drawn 8B
# weights, 80 % supervised).
FUSED_CHECKED = (
    Check("2 x 2,048 tokens a pass, all layers kept", "H100", 2, 2048, 1, 15821, kept=32, passes=4),
    Check("the same, none kept", "H100", 2, 2048, 1, 12066, passes=4),
    Check("8 x 2,048 packed, all kept", "H100", 8, 2048, 1, 16581, kept=32, passes=1),
    Check("16 short rows packed, all kept", "H100", 16, 6787 / 16, 1, 16362, kept=32, passes=1),
    Check("the same, none kept", "H100", 16, 6787 / 16, 1, 12529, passes=1),
    Check(
        "2 short rows a pass, all kept",
        "H100",
        2,
        6787 / 16,
        1,
        5810,
        kept=32,
        passes=8,
        padded=1.23,
    ),
)
CALIBRATED_ON = (CHECKED[1], FUSED_CHECKED[-1])  # the host's times come from them


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


def fused_pass_time(
    shapes: Shapes,
    card: str,
    *,
    rows: float,
    row_tokens: float,
    supervised_share: float = 1.0,
    r: int = 16,
    targets: Sequence[str] = ALL_SEVEN,
    kept: int = 0,
    held: int = 0,
    streamed: int = 0,
) -> PassTime | None:
    """One forward and backward pass of `fused`.

    It keeps `kept` layers whole and holds the weights of `held` in 16 bits. `streamed` layers are
    copied from the host in each half of the pass, while the layers before them compute.
    """
    rates = RATES.get(card)
    if rates is None:
        return None
    places, again = rows * row_tokens, 1 - kept / shapes.layers
    efficiency = 0.95 if places >= 2048 else 0.8
    down = (
        shapes.layers * shapes.intermediate * shapes.hidden
    )  # its product is never computed again
    adapters = shapes.lora_weights(r, targets)
    products = (
        shapes.linear_weights * 2 + (shapes.linear_weights - down) * again + adapters * (3 + again)
    )
    flop = 2 * places * (products + shapes.embedding_weights * 2 * supervised_share)
    attention = shapes.layers * 2 * row_tokens * shapes.q_width * places
    attention_s = (
        attention * (1 + again) / rates.attention + 2.5 * attention / rates.attention_backward
    )
    # In the backward pass a layer's weights are dequantised once, whether it is recomputed or not.
    dequantize = 2 * (NF4_BYTES + 2) * shapes.linear_weights * (1 - held / shapes.layers)
    # Bytes a place and layer: norms with their sums, rotary, attention's output copied, SwiGLU. A
    # recomputed one lacks the last.
    rest, swiglu = (
        20 * shapes.hidden + 4 * (shapes.q_width + shapes.kv_width),
        6 * shapes.intermediate,
    )
    backward = 24 * shapes.hidden + 4 * (shapes.q_width + 2 * shapes.kv_width) + 2 * swiglu
    elementwise = (rest + swiglu + backward + rest * again) * places * shapes.layers
    logits = (
        6 * places * supervised_share * shapes.vocabulary
    )  # written once in 16 bits, read twice, written again
    gpu = (
        flop / (rates.matmul * efficiency)
        + attention_s
        + (dequantize + elementwise + logits) / rates.copy
    )
    forward = (
        2 * places * (shapes.linear_weights + adapters) / (rates.matmul * efficiency)
        + attention / rates.attention
        + (dequantize / 2 + (rest + swiglu) * places * shapes.layers) / rates.copy
    )
    # The last layer's weights serve both halves.
    copies = (streamed, min(streamed, shapes.layers - 1))
    halves = (forward, gpu - forward)
    layer_s = NF4_BYTES * shapes.linear_weights / shapes.layers / rates.link
    waits = sum(
        max(0.0, count * layer_s - half) for count, half in zip(copies, halves, strict=True)
    )
    gpu += waits
    host = shapes.layers * (FUSED_HOST_S_PER_LAYER + FUSED_HOST_S_PER_RECOMPUTED * again)
    return PassTime(gpu, host, waits)


def hidden_tokens(
    shapes: Shapes, card: str, *, row_tokens: float, streamed: int, r: int, targets: Sequence[str]
) -> int | None:
    """Least tokens of a pass for which `streamed` layers arrive in time.

    A multiple of 64. None for a card without rates.
    """
    if card not in RATES:
        return None
    for tokens in range(64, 1 << 16, 64):
        one = fused_pass_time(
            shapes,
            card,
            rows=max(1.0, tokens / row_tokens),
            row_tokens=min(row_tokens, tokens),
            streamed=streamed,
            r=r,
            targets=targets,
        )
        if one is not None and not one.waits_s:
            return tokens
    return 1 << 16


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


def errors(engine: str = "peft") -> list[tuple[Check, float, float]]:
    """Yield (check, predicted tokens/s, error) of every compared run.

    An error of 0.1 is predicted 10 % too fast.
    """
    found = []
    shapes = KNOWN["deepseek-ai/DeepSeek-R1-Distill-Llama-8B"]
    for check in FUSED_CHECKED if engine == "fused" else CHECKED:
        work: dict[str, Any] = dict(rows=check.rows * check.padded, row_tokens=check.row_tokens)
        if engine == "fused":
            one = fused_pass_time(shapes, check.card, **work, supervised_share=0.8, kept=check.kept)
        else:
            one = pass_time(shapes, check.card, **work)
        assert one is not None
        passes = (
            check.passes or 8 // check.ranks
        )  # 16 rows an update, 2 a pass; the full rows had 4
        fast = tokens_per_s(
            one, rows=check.rows, row_tokens=check.row_tokens, passes=passes, ranks=check.ranks
        )
        found.append((check, fast, fast / check.measured_tokens_per_s - 1))
    return found
