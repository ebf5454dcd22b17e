"""Seconds of a run on a CPU, from shapes and measured rates.

A run's time has three parts: training, loss on held-out rows, and answers. Answers are written
token by token, so each token dequantises every weight: they take as long as training on few rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from glassloop.predict.shapes import Shapes

# Share of a matrix product's rate that training reaches: 0.71 with 470 slot tokens a pass, 0.65
# with 147 (SmolLM2, one thread a rank).
TRAINS = 0.67
FORWARD = 0.4  # of an update's FLOPs, without recomputation
# Seconds of Python and adapters for each projection of a forward pass, the same runs.
PROJECTION_S = 2.5e-4


@dataclass(frozen=True)
class CpuSpeed:
    """What a CPU reaches.

    Attributes:
        flops_per_s: Of a product of fp32 matrices, all ranks together.
        weight_s: Seconds a weight when one token goes through a linear layer, one rank.
    """

    flops_per_s: float
    weight_s: float


@dataclass(frozen=True)
class Answers:
    """Answers to generate: `rows`, `times` over, up to `new_tokens` each.

    In batches.
    """

    times: int
    rows: int
    new_tokens: int


def training_s(flops: float, speed: CpuSpeed) -> float:
    """Seconds of training, for the FLOPs of all ranks."""
    return flops / (speed.flops_per_s * TRAINS)


def measuring_s(flops: float, speed: CpuSpeed) -> float:
    """Seconds of a loss without gradients.

    From the FLOPs that training on its rows would take.
    """
    return training_s(FORWARD * flops, speed)


def answering_s(
    shapes: Shapes, answers: Answers, speed: CpuSpeed, *, ranks: int, batch: int
) -> float:
    """Most seconds that answers take: none of them ends before `new_tokens`.

    `batch`: rows that a rank answers together.
    """
    mine = -(-answers.rows // ranks)
    batches = -(-mine // batch)
    projections = shapes.layers * len(shapes.projections)
    step = (shapes.linear_weights + shapes.embedding_weights) * speed.weight_s
    return answers.times * batches * answers.new_tokens * (step + projections * PROJECTION_S)
