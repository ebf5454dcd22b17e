"""Runs that predicted speeds were compared with.

Cards without one have never been checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from glassloop.predict.fused_time import fused_pass_time
from glassloop.predict.roofline import pass_time, tokens_per_s
from glassloop.predict.shapes import KNOWN
from glassloop.predict.tiers import Tiers


@dataclass(frozen=True)
class Check:
    """A run that was measured, and what is predicted of it."""

    what: str
    card: str
    rows: int
    row_tokens: float
    ranks: int
    measured_tokens_per_s: float  # all ranks together; real tokens
    tiers: Tiers | None = None  # engine `fused`
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
WHOLE, NONE, AWAY = Tiers(32), Tiers(0), Tiers(1, "all")
SHORT = 6787 / 16
FUSED_CHECKED = (
    Check("2 x 2,048 tokens a pass, all layers kept", "H100", 2, 2048, 1, 15821, WHOLE, 4),
    Check("the same, none kept", "H100", 2, 2048, 1, 12066, NONE, 4),
    Check("8 x 2,048 packed, all kept", "H100", 8, 2048, 1, 16581, WHOLE, 1),
    Check("16 short rows packed, all kept", "H100", 16, SHORT, 1, 16362, WHOLE, 1),
    Check("the same, none kept", "H100", 16, SHORT, 1, 12529, NONE, 1),
    Check("2 short rows a pass, all kept", "H100", 2, SHORT, 1, 5810, WHOLE, 8, 1.23),
    Check(
        "a row of 16,384, three tensors a layer on the host", "H200", 1, 16384, 1, 10528, AWAY, 1
    ),
    Check("the same of 32,768", "H200", 1, 32768, 1, 8200, AWAY, 1),
    Check("the same of 65,536", "H200", 1, 65536, 1, 5674, AWAY, 1),
)
# The host's times come from two of them, attention's rates in long rows from three.
CALIBRATED_ON = (CHECKED[1], *FUSED_CHECKED[5:])


def errors(engine: str = "peft") -> list[tuple[Check, float, float]]:
    """Yield (check, predicted tokens/s, error) of every compared run.

    An error of 0.1 is predicted 10 % too fast.
    """
    found = []
    shapes = KNOWN["deepseek-ai/DeepSeek-R1-Distill-Llama-8B"]
    for check in FUSED_CHECKED if engine == "fused" else CHECKED:
        work: dict[str, Any] = dict(rows=check.rows * check.padded, row_tokens=check.row_tokens)
        if engine == "fused":
            one = fused_pass_time(
                shapes, check.card, **work, supervised_share=0.8, tiers=check.tiers
            )
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
