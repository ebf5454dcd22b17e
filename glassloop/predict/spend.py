"""Spending of a card's memory by the engine `fused`.

Tiers for a pass, or a pass for which everything is kept: arithmetic of ledger.py and tiers.py.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace

from glassloop.predict import tiers
from glassloop.predict.choice import Asked, Base, Room, choose
from glassloop.predict.ledger import fused_head_bytes, ledger_of
from glassloop.predict.shapes import Shapes
from glassloop.predict.terms import GIB, Work, layer_bytes, resident, tiers_of
from glassloop.predict.tiers import (
    FRAGMENTATION,
    MOST_PASS_TOKENS,
    PASS_STEP,
    Tiers,
    sizes_of,
)

# Tokens of a pass behind which layers arrive in time, on any card in a slot of 16 lanes.
HIDING_TOKENS = 4096


def with_tiers(shapes: Shapes, work: Work, budget_bytes: int) -> Work:
    """The work as `fused` does it within a GPU's bytes.

    It has a pass size, if the engine chooses it, and tiers.
    """
    if work.between is not None:
        longest, share = work.between
        tokens = min(max(longest, chosen_pass(shapes, work, budget_bytes)), share)
        supervised = (
            None
            if work.supervised_tokens is None
            else -(-work.supervised_tokens * tokens // work.tokens)
        )
        work = replace(work, tokens=tokens, supervised_tokens=supervised, between=None)
    if not work.checkpointing:
        base = base_of(shapes, work)
        streamed = 0 if base is None else base.streamed(shapes.layers) or 0
        return replace(work, tiers=Tiers(shapes.layers, streamed=streamed))
    used, base = resident_bytes(shapes, work), base_of(shapes, work)
    if base is not None:  # counted apart from what is used
        used -= base.bytes(shapes.layers, 0)
    asked = Asked(
        work.profile,
        work.places,
        work.supervised,
        host_bytes=host_bytes_of(shapes, work),
        longest=0 if work.packed else work.tokens,
        split=work.split,
    )
    room = Room(
        used,
        budget_bytes - used,
        head=fused_head_bytes(shapes, work),
        embedding=movable_bytes(shapes, work),
        base=base,
    )
    one = sizes_of(shapes, work.r, work.targets, work.act)
    return replace(work, tiers=choose(asked, room, one, shapes.layers))


def base_of(shapes: Shapes, work: Work) -> Base | None:
    """The 4-bit layers that may stream; None for other bases."""
    if work.quantization != "nf4":
        return None
    return Base(work.base, layer_bytes(shapes, work), ranks=work.ranks)


def movable_bytes(shapes: Shapes, work: Work) -> int:
    """Bytes of the embedding, if it may lie on the host."""
    return 0 if shapes.tied_head else shapes.embedding_weights * work.act


def host_bytes_of(shapes: Shapes, work: Work) -> int:
    """Bytes of the host that layers' large tensors may take.

    As asked, or what the host has beside the embedding and a base that may stream.
    """
    if work.host_gib is not None:
        return int(work.host_gib * GIB)
    base = base_of(shapes, work)
    locked = (
        0 if base is None or base.asked in ("gpu", "sharded") else base.layer_bytes * shapes.layers
    )
    return max(0, int(work.host_has_gib * GIB) - movable_bytes(shapes, work) - locked)


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


def chosen_pass(shapes: Shapes, work: Work, budget_bytes: int) -> int:
    """Tokens of a run's packed passes; 0: its longest row."""
    found = pass_tokens_of(shapes, work, budget_bytes)
    return found or streaming_pass(shapes, work, budget_bytes)


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


def streaming_pass(shapes: Shapes, work: Work, budget_bytes: int) -> int:
    """Tokens of a packed pass that hides the copies of layers.

    0 where no layer has to stream, or no such pass fits.
    """
    for tokens in (PASS_STEP, *range(HIDING_TOKENS, 0, -PASS_STEP)):
        one = replace(
            work, rows=1, tokens=tokens, supervised_tokens=None, checkpointing=True, between=None
        )
        one = with_tiers(shapes, one, budget_bytes)
        if not tiers_of(shapes, one).streamed:
            return 0
        peak = ledger_of(shapes, one, "fused").peak_bytes * (1 + FRAGMENTATION)
        if tokens != PASS_STEP and peak <= budget_bytes:
            return tokens
    return 0
