"""Tokens a second by card, predicted: time of the arithmetic and of the memory traffic of a pass, or of its host where that is longer.

Nothing here is measured on the run's own machine. Rates are those that large bf16 matrix products and copies reached on each card, not data sheets.
CHECKED holds the runs that the prediction was compared with; cards without one have never been checked.

Legend: H hidden size, I intermediate size, V vocabulary, L layers, T real or padded places of a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from glassloop.predict.shapes import KNOWN, Shapes

ALL_SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight, with double quantisation
# Host time of a pass through the engine `peft`, a layer: forward, recomputation and backward launch some hundred kernels from Python. From short
# rows on an H200 (8 passes of 32 layers in 4.4 s); another CPU will differ.
HOST_S_PER_LAYER = 0.0172
OVERHEAD_S_PER_UPDATE = 0.05  # norm, gate, optimizer, records


@dataclass(frozen=True)
class Rates:
    """What a card sustains: bf16 matrix products, copies (bytes/s), attention forward and backward."""

    matmul: float
    copy: float
    attention: float
    attention_backward: float


RATES = {
    "3090": Rates(75e12, 0.85e12, 50e12, 35e12),
    "4090": Rates(162e12, 0.92e12, 95e12, 75e12),
    "A100-40": Rates(262e12, 1.35e12, 180e12, 130e12),
    "A100-80": Rates(262e12, 1.70e12, 180e12, 130e12),
    "H100": Rates(760e12, 3.0e12, 225e12, 200e12),
    "H200": Rates(760e12, 4.3e12, 225e12, 200e12),
}


@dataclass(frozen=True)
class PassTime:
    """Seconds of one pass on one rank; `seconds` is the longer of the two, since the GPU works while the host launches."""

    gpu_s: float
    host_s: float

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
    measured_tokens_per_s: float  # all ranks together


SCAM_ROW_TOKENS = 350.0
CHECKED = (
    Check("2 x 2,048 tokens a pass, 1 rank", "H100", 2, 2048, 1, 6413),
    Check("2 short rows a pass, 1 rank", "H200", 2, SCAM_ROW_TOKENS, 1, 1277),
    Check("2 short rows a pass, 2 ranks", "H200", 2, SCAM_ROW_TOKENS, 2, 2999),
)
CALIBRATED_ON = CHECKED[1]  # the host's time comes from it


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
    """One forward and backward pass of the engine `peft` in bf16 or fp16; None for a card whose rates are not known."""
    rates = RATES.get(card)
    if rates is None:
        return None
    places, again = rows * row_tokens, int(checkpointing)
    efficiency = 0.95 if places >= 2048 else 0.8  # of the rate of large square products
    adapters = shapes.lora_weights(r, targets)
    head = shapes.embedding_weights
    flop = 2 * places * (shapes.linear_weights * (2 + again) + head * 2 * supervised_share + adapters * (3 + again))
    # Causal attention, forward: 2 products of (row_tokens / 2) x head_dim for every place and head, 2 FLOP each.
    attention = shapes.layers * 2 * row_tokens * shapes.q_width * places
    attention_s = attention * (1 + again) / rates.attention + 2.5 * attention / rates.attention_backward
    # Dequantisation reads 4 bits and writes 16 for each weight, and its scales on the way, once a product.
    dequantize = (NF4_BYTES + 2.25) * shapes.linear_weights * (2 + again) if quantized else 0.0
    elementwise = elementwise_bytes(shapes, targets) * places * shapes.layers * (3 + again)  # backward counts twice
    logits = 8 * places * supervised_share * shapes.vocabulary
    gpu = flop / (rates.matmul * efficiency) + attention_s + (dequantize + elementwise + logits) / rates.copy
    return PassTime(gpu, HOST_S_PER_LAYER * shapes.layers * (2 + again) / 3)


def elementwise_bytes(shapes: Shapes, targets: Sequence[str]) -> int:
    """Bytes that a layer's forward pass reads and writes for one place outside of matrix products."""
    norms_and_residuals = 20 * shapes.hidden  # each norm reads and writes once, each residual sum reads twice and writes once
    rope = 20 * (shapes.q_width + shapes.kv_width)
    swiglu = 10 * shapes.intermediate
    widths = [shapes.projections[target] for target in targets]
    # An adapter reads x; its output is scaled, the base's copied, and both added.
    adapters = sum(2 * inner + 16 * outer for inner, outer in widths)
    return norms_and_residuals + rope + swiglu + adapters


def tokens_per_s(one: PassTime, *, rows: float, row_tokens: float, passes: float, ranks: int) -> float:
    """Of all ranks together, over whole updates of `passes` passes a rank."""
    return ranks * passes * rows * row_tokens / (passes * one.seconds + OVERHEAD_S_PER_UPDATE)


def errors() -> list[tuple[Check, float, float]]:
    """(check, predicted tokens/s, error) of every run of CHECKED; 0.1 is predicted 10 % too fast."""
    found = []
    shapes = KNOWN["deepseek-ai/DeepSeek-R1-Distill-Llama-8B"]
    for check in CHECKED:
        one = pass_time(shapes, check.card, rows=check.rows, row_tokens=check.row_tokens)
        assert one is not None
        passes = 8 // check.ranks  # 16 rows an update, 2 a pass; the full rows had 4
        fast = tokens_per_s(one, rows=check.rows, row_tokens=check.row_tokens, passes=passes, ranks=check.ranks)
        found.append((check, fast, fast / check.measured_tokens_per_s - 1))
    return found
