"""Speed of this card's matrix products at a model's shapes.

A model FLOP utilisation is measured against it.
"""

from __future__ import annotations

import torch

from glassloop.predict.shapes import Shapes

PLACES = 4096  # rows of the left factor: two rows of 2,048 tokens
REPEATS = 10


def matmul_ceiling(shapes: Shapes, device: torch.device) -> float | None:
    """Measure FLOP/s of a layer's bf16 products, x W^T and dY W.

    The four grouped shapes have PLACES places. None without a GPU or memory for them.

    q, k, v and gate, up are taken as one product each: the largest products that the layer's
    mathematics allows.
    """
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    try:
        return _measured(shapes, device)
    except torch.OutOfMemoryError:
        return None


def _measured(shapes: Shapes, device: torch.device) -> float:
    h, i = shapes.hidden, shapes.intermediate
    flop = seconds = 0.0
    for outer, inner in (
        (shapes.q_width + 2 * shapes.kv_width, h),
        (h, shapes.q_width),
        (2 * i, h),
        (h, i),
    ):
        x = torch.randn(PLACES, inner, device=device, dtype=torch.bfloat16)
        w = torch.randn(outer, inner, device=device, dtype=torch.bfloat16)
        y = torch.randn(PLACES, outer, device=device, dtype=torch.bfloat16)
        for _ in range(3):
            _ = x @ w.t(), y @ w
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(REPEATS):
            _ = x @ w.t(), y @ w
        end.record()
        torch.cuda.synchronize(device)
        seconds += begin.elapsed_time(end) / 1e3
        flop += REPEATS * 4 * PLACES * outer * inner
    return flop / seconds
