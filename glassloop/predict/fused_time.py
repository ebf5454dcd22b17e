"""Predicted seconds of a pass of the engine `fused`.

It counts what is computed twice, what is copied to and from the host, and what is cut in chunks.

Legend: see roofline.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from glassloop.predict.roofline import (
    ALL_SEVEN,
    FUSED_HOST_S_PER_LAYER,
    FUSED_HOST_S_PER_RECOMPUTED,
    NF4_BYTES,
    RATES,
    PassTime,
    attention_rates,
)
from glassloop.predict.shapes import Shapes
from glassloop.predict.tiers import Tiers, away_bytes, sizes_of

ELEMENT = 2  # bytes: rates are those of 16 bits
# Bytes a place and column of H that chunks cost: outputs are copied to whole tensors, the gradients
# of attention's groups of heads likewise.
CHUNK_COPIES = 20


def fused_pass_time(
    shapes: Shapes,
    card: str,
    *,
    rows: float,
    row_tokens: float,
    supervised_share: float = 1.0,
    r: int = 16,
    targets: Sequence[str] = ALL_SEVEN,
    tiers: Tiers | None = None,
) -> PassTime | None:
    """One forward and backward pass.

    Layers that stream, and tensors that wait on the host, are copied while layers compute. They
    cost time where that is too short. None for a card without rates.

    Args:
        tiers: of the pass; None: every layer is computed again from its input.
    """
    rates = RATES.get(card)
    if rates is None:
        return None
    tiers = Tiers(0) if tiers is None else tiers
    places, layers = rows * row_tokens, shapes.layers
    again = 1 - tiers.kept / layers
    per_layer = {name: inner * outer for name, (inner, outer) in shapes.projections.items()}
    # Computed once: the product of down_proj, and what lies on the host.
    once = per_layer["down_proj"] + (per_layer["o_proj"] if tiers.host == "all" else 0)
    attended_again = again if tiers.host in ("nothing", "inputs") else 0.0
    efficiency = 0.95 if places >= 2048 else 0.8
    adapters = shapes.lora_weights(r, targets)
    products = shapes.linear_weights * 2 + (shapes.linear_weights - layers * once) * again
    products += adapters * (3 + again)
    flop = 2 * places * (products + shapes.embedding_weights * 2 * supervised_share)
    attention = layers * 2 * row_tokens * shapes.q_width * places
    rate, rate_backward = attention_rates(card, row_tokens)
    attention_s = attention * (1 + attended_again) / rate + 2.5 * attention / rate_backward
    # In the backward pass a layer's weights are dequantised once, whether it is recomputed or not.
    dequantize = 2 * (NF4_BYTES + 2) * shapes.linear_weights * (1 - tiers.held / layers)
    # Bytes a place and layer: norms with their sums, rotary, attention's output copied, SwiGLU. A
    # recomputed one lacks the last.
    rest = 20 * shapes.hidden + 4 * (shapes.q_width + shapes.kv_width)
    swiglu = 6 * shapes.intermediate
    backward = 24 * shapes.hidden + 4 * (shapes.q_width + 2 * shapes.kv_width) + 2 * swiglu
    pieces = math.ceil(places / tiers.chunk) if tiers.chunk else 1
    cut = CHUNK_COPIES * shapes.hidden * (pieces > 1)
    elementwise = (rest + swiglu + backward + rest * again + cut) * places * layers
    # Logits are written once in 16 bits, read twice, written again.
    logits = 6 * places * supervised_share * shapes.vocabulary
    gpu = flop / (rates.matmul * efficiency) + attention_s
    gpu += (dequantize + elementwise + logits) / rates.copy
    forward = 2 * places * (shapes.linear_weights + adapters) / (rates.matmul * efficiency)
    forward += attention / rate
    forward += (dequantize / 2 + (rest + swiglu) * places * layers) / rates.copy
    waits = waits_s(shapes, rates.link, tiers, places, (forward, gpu - forward))
    host = layers * (FUSED_HOST_S_PER_LAYER + FUSED_HOST_S_PER_RECOMPUTED * again) * pieces
    return PassTime(gpu + waits, host, waits)


def waits_s(
    shapes: Shapes, link: float, tiers: Tiers, places: float, halves: tuple[float, float]
) -> float:
    """Seconds that the GPU waits for copies to and from the host.

    A link carries both directions at once: forward sends tensors away while layers come.

    Args:
        link: bytes/s, of one direction. halves: seconds of forward's and backward's computing.
    """
    layers = shapes.layers
    layer_s = NF4_BYTES * shapes.linear_weights / layers / link
    one = sizes_of(shapes, 0, (), ELEMENT)
    tensors_s = away_bytes(one, round(places), tiers.host) / link * (layers - tiers.kept)
    forward = max(tiers.streamed * layer_s, tensors_s)
    # The last layer's weights serve both halves.
    backward = min(tiers.streamed, layers - 1) * layer_s + tensors_s
    return max(0.0, forward - halves[0]) + max(0.0, backward - halves[1])


def hidden_tokens(
    shapes: Shapes, card: str, *, row_tokens: float, streamed: int, r: int, targets: Sequence[str]
) -> int | None:
    """Least tokens of a pass for which `streamed` layers arrive in time.

    A multiple of 64. None for a card without rates.
    """
    if card not in RATES:
        return None
    tiers = Tiers(0, streamed=streamed)
    for tokens in range(64, 1 << 16, 64):
        one = fused_pass_time(
            shapes,
            card,
            rows=max(1.0, tokens / row_tokens),
            row_tokens=min(row_tokens, tokens),
            tiers=tiers,
            r=r,
            targets=targets,
        )
        if one is not None and not one.waits_s:
            return tokens
    return 1 << 16
