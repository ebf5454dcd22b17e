"""Bounds and angles of a pass, by what its layers differ in."""

from __future__ import annotations

from typing import Any

import torch

from glassloop.data.rows import Pass
from glassloop.engines.fused.attention import Bounds
from glassloop.engines.fused.attention_work import Scores
from glassloop.engines.fused.exchange import Exchange
from glassloop.engines.fused.linear import Scratch
from glassloop.engines.fused.parts import Where
from glassloop.engines.fused.rotary import Angles, angles, no_angles
from glassloop.plan.described import Described


def where_of(p: Pass, of: Described, rotary: Any, dtype: torch.dtype, scratch: Scratch) -> Where:
    """Bounds and angles of a pass.

    A padded row counts with its padding, to its right, which causal attention hides from its
    tokens.

    Args:
        rotary: transformers' module with the frequencies. dtype: of q, k and v.

    Raises:
        ValueError: a row is longer than the model's positions are described for.
    """
    rows, width = p.input_ids.shape
    lengths = p.lengths if p.packed else (width,) * rows
    device, longest = p.input_ids.device, max(lengths)
    if of.longest is not None and longest > of.longest:
        raise ValueError(
            f"execution.engine = fused: a row has {longest} tokens, and the model takes positions "
            f"otherwise beyond {of.longest}: set data.max_tokens={of.longest}, or "
            "execution.engine=peft"
        )
    made: dict[int | None, Bounds] = {}
    bounds: dict[int | None, Bounds] = {}
    for window in {kind.window for kind in of.kinds}:
        used = window if window is not None and window < longest else None
        if used not in made:
            scores = Scores(of.score_scale, of.score_cap, used)
            made[used] = Bounds.of(lengths, device, dtype, of.head_size, scores)
        bounds[window] = made[used]
    turns = {kind.rotary: _angles(p, of, rotary, kind.rotary) for kind in of.kinds}
    return Where(bounds, turns, scratch, exchange_of(p))


def exchange_of(p: Pass) -> Exchange | None:
    """The exchange between ranks that share a pass; None: one alone."""
    return None if p.part is None else Exchange(p.part.rank, p.part.places)


def _angles(p: Pass, of: Described, rotary: Any, name: str | None) -> Angles:
    """Angles of one set of frequencies."""
    positions = p.position_ids.flatten()
    if name is None:
        return no_angles(len(positions), of.head_size, positions.device)
    prefix = f"{name}_" if name else ""
    # those for longer rows take the place of longrope's once transformers has seen one
    name = "inv_freq" if of.longest is None else "original_inv_freq"
    frequencies = getattr(rotary, f"{prefix}{name}")
    scaling = getattr(rotary, f"{prefix}attention_scaling")
    assert 2 * len(frequencies) == of.rotated, "the description and transformers differ"
    return angles(positions, frequencies, scaling, size=of.head_size, interleaved=of.interleaved)
