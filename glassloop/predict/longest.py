"""The longest row of a card, and the speed of long ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

from glassloop.predict.fused_time import fused_pass_time
from glassloop.predict.host import HostLedger, host_ledger
from glassloop.predict.ledger import ledger_of
from glassloop.predict.roofline import tokens_per_s
from glassloop.predict.shapes import Shapes
from glassloop.predict.spend import base_of, movable_bytes, with_tiers
from glassloop.predict.terms import Work, tiers_of
from glassloop.predict.tiers import FRAGMENTATION, Tiers, room_bytes, sizes_of

STEP = 256  # tokens; a length is a multiple
MOST = 1 << 22  # tokens that are tried
LONG = (16384, 32768, 65536)  # tokens of rows whose speed a plan shows


@dataclass(frozen=True)
class Longest:
    """A length, its computation, and the host memory it takes."""

    tokens: int  # 0: not even STEP of them fit
    tiers: Tiers
    host: HostLedger


@dataclass(frozen=True)
class RowSpeed:
    """An update of one row, as predicted."""

    tokens: int
    tokens_per_s: float


def longest_row(shapes: Shapes, work: Work, budget_bytes: int) -> Longest:
    """Find the longest row that fits a GPU's bytes.

    Every token is supervised.

    Profile, adapters and host memory are those of `work`. With `work.split` it lies on that many
    cards.
    """
    few, many = 0, 1  # steps that fit, and that do not
    while many * STEP <= MOST and fits(shapes, row_of(work, many * STEP), budget_bytes):
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        if fits(shapes, row_of(work, middle * STEP), budget_bytes):
            few = middle
        else:
            many = middle
    one = with_tiers(shapes, row_of(work, max(1, few) * STEP), budget_bytes)
    return Longest(few * STEP, tiers_of(shapes, one), host_of(shapes, one))


def row_of(work: Work, tokens: int) -> Work:
    """A pass of one row, every token supervised."""
    return replace(
        work, rows=1, tokens=tokens, supervised_tokens=None, checkpointing=True, between=None
    )


def row_speeds(
    card: str, shapes: Shapes, work: Work, budget_bytes: int, longest: int
) -> tuple[RowSpeed, ...]:
    """Speeds of the long rows that fit, the longest last.

    Empty if none fits, for a card without rates, and for fp32.
    """
    found: list[RowSpeed] = []
    if not longest or work.precision == "fp32":
        return ()
    for tokens in (*(one for one in LONG if one < longest), longest):
        one = with_tiers(shapes, row_of(work, tokens), budget_bytes)
        took = fused_pass_time(
            shapes,
            card,
            rows=1 / work.split,
            row_tokens=tokens,
            r=work.r,
            targets=work.targets,
            tiers=tiers_of(shapes, one),
        )
        if took is not None:
            ranks = work.split
            speed = tokens_per_s(took, rows=1 / ranks, row_tokens=tokens, passes=1, ranks=ranks)
            found.append(RowSpeed(tokens, speed))
    return tuple(found)


def fits(shapes: Shapes, work: Work, budget_bytes: int) -> bool:
    """True if torch's allocator needs no more than the budget for `fused`."""
    peak = ledger_of(shapes, with_tiers(shapes, work, budget_bytes), "fused").peak_bytes
    return peak * (1 + FRAGMENTATION) <= budget_bytes


def host_of(shapes: Shapes, work: Work) -> HostLedger:
    """Host memory that work with tiers locks.

    A base that stays on the card does not count.
    """
    chosen = tiers_of(shapes, work)
    one = sizes_of(shapes, work.r, work.targets, work.act)
    away = chosen.host != "nothing"
    layers = shapes.layers - chosen.kept if away else 0
    base = base_of(shapes, work) if chosen.streamed else None
    return host_ledger(
        movable_bytes(shapes, work) if away else 0,
        room_bytes(one, work.places, layers, chosen.host),
        0 if base is None or base.asked == "sharded" else base.layer_bytes * shapes.layers,
    )
