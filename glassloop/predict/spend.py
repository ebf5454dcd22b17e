"""Spending of a card's memory by the engine `fused`.

Tiers for a pass, or a pass for which everything is kept: arithmetic of ledger.py and tiers.py.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace

from glassloop.predict import tiers
from glassloop.predict.ledger import fused_head_bytes
from glassloop.predict.shapes import Shapes
from glassloop.predict.terms import GIB, Work, resident, tiers_of
from glassloop.predict.tiers import MOST_PASS_TOKENS, PASS_STEP, sizes_of


def with_tiers(shapes: Shapes, work: Work, budget_bytes: int) -> Work:
    """The work as `fused` does it within a GPU's bytes.

    It has a pass size, if the engine chooses it, and tiers.
    """
    if work.between is not None:
        longest, share = work.between
        tokens = min(max(longest, pass_tokens_of(shapes, work, budget_bytes)), share)
        supervised = (
            None
            if work.supervised_tokens is None
            else -(-work.supervised_tokens * tokens // work.tokens)
        )
        work = replace(work, tokens=tokens, supervised_tokens=supervised, between=None)
    if not work.checkpointing:
        return work
    used = resident_bytes(shapes, work)
    found = tiers.choose(
        work.profile,
        sizes_of(shapes, work.r, work.targets, work.act),
        shapes.layers,
        tokens=work.places,
        used=used,
        free=budget_bytes - used,
        head_bytes=fused_head_bytes(shapes, work),
        host_bytes=int(work.host_gib * GIB),
    )
    return replace(work, tiers=found)


def resident_bytes(shapes: Shapes, work: Work) -> int:
    """Bytes that `fused` holds between updates, before any choice."""
    one = sizes_of(shapes, work.r, work.targets, work.act)
    base = sum(
        term.size_bytes
        for term in resident(shapes, replace(work, tiers=None))
        if "backward" in term.phases
    )
    return (
        base
        + shapes.layers * tiers.shadow_bytes(one)
        + tiers.scratch_bytes(one)
        + tiers.product_bytes(one)
    )


def pass_tokens_of(shapes: Shapes, work: Work, budget_bytes: int) -> int:
    """Most tokens of a packed pass with all layers kept.

    A multiple of PASS_STEP (engine `fused`); 0 if there is none. Every token is taken to be
    supervised; the tokens of `work` do not matter. More than MOST_PASS_TOKENS would gain nothing.
    """
    sizes = range(PASS_STEP, MOST_PASS_TOKENS + 1, PASS_STEP)

    def too_large(tokens: int) -> bool:
        one = replace(
            work, rows=1, tokens=tokens, supervised_tokens=None, checkpointing=True, between=None
        )
        return tiers_of(shapes, with_tiers(shapes, one, budget_bytes)).kept < shapes.layers

    return PASS_STEP * bisect_left(sizes, True, key=too_large)
