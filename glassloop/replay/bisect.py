"""The place of an update's trouble: rank, pass, row, layer, token.

Each part (a rank's share, a pass, a row alone) gets its own backward; shares add up to g, so a
part's gradient norm says how much of the update is its doing. What is not finite stands out first;
else what is far above the median of the other parts, or of a healthy update's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch

from glassloop.data.batches import Window, build_pass
from glassloop.data.rows import IGNORE, Row
from glassloop.replay.layers import LayerFinding, inspect_layers
from glassloop.replay.matrices import MatrixStat
from glassloop.replay.progress import Tell, silent
from glassloop.replay.replica import Parts
from glassloop.replay.reproduce import Carried, Scene, carry_out, enter, replayed
from glassloop.saved.state import restore_rng, rng_state

NORM_FACTOR = 5.0  # a row whose share of g has this many times the median norm stands out
LOSS_FACTOR = 3.0  # the same for its loss a token
MOST_ROWS = 64  # rows that are tried alone; of a larger update only those of the worst pass


@dataclass(frozen=True)
class Part:
    """A rank, a pass or a row of the update."""

    name: str
    rank: int
    index: int | None  # of the pass within the rank; None for a whole rank
    row: int | None  # index into scene.rows; None for more than one
    supervised_tokens: int
    loss_nats: float | None  # token mean; None without supervised tokens
    grad_norm: float  # of its share of g
    loss_factor: float | None = None  # over the median of the other parts
    norm_factor: float | None = None
    norm_share: float | None = None  # of the sum of all parts' norms
    # A factor that stands out does so over the healthy update's rows too; True where none is known
    above_healthy: bool = True

    @property
    def finite(self) -> bool:
        return math.isfinite(self.grad_norm) and (
            self.loss_nats is None or math.isfinite(self.loss_nats)
        )

    @property
    def stands_out(self) -> bool:
        out = (self.norm_factor or 0) >= NORM_FACTOR or (self.loss_factor or 0) >= LOSS_FACTOR
        return not self.finite or (out and self.above_healthy)


@dataclass(frozen=True)
class TokenLoss:
    """One supervised place of a row."""

    position: int  # of the token that is predicted, within its row
    token_id: int
    loss_nats: float


@dataclass(frozen=True)
class Bisection:
    """The result of the walk.

    `rank`, `one_pass` and `row` are the suspects of their level; None if none stands out.
    """

    ranks: tuple[Part, ...]
    passes: tuple[Part, ...]
    rows: tuple[Part, ...]
    rank: Part | None
    one_pass: Part | None
    row: Part | None
    everything: bool  # not finite in every part: the rows are not to blame
    # Median loss a token (nats) and gradient norm of a healthy update's rows.
    healthy_rows: tuple[float, float] | None
    looked_at: str  # whose gradient and activations `matrices` and `layer` are of
    matrices: tuple[MatrixStat, ...]
    layer: LayerFinding | None
    token_row: str  # the row whose tokens are listed
    tokens: tuple[TokenLoss, ...]  # in order


def bisect(scene: Scene, healthy: Scene | None, tell: Tell = silent) -> Bisection:
    """Walk the update down to the suspects.

    The parts are left in an undefined state: `enter` puts them right.

    `tell` is called before each part: the whole, the passes, each row, the layers.
    """
    few = len(scene.window.rows) <= MOST_ROWS
    total = 3 + (len(scene.window.rows) if few else 1)
    tell(0, total, "the whole update")
    healthy_rows = _medians(row_parts(healthy, None)) if healthy is not None else None
    parts = enter(scene)
    whole = replayed(scene)
    ranks = _rank_parts(scene, whole)
    rank = _suspect(ranks)
    tell(1, total, "each pass")
    passes = _pass_parts(scene)
    one_pass = _suspect([part for part in passes if rank is None or part.rank == rank.rank])
    fallback = one_pass or max(passes, key=_weight)
    rows = row_parts(
        scene,
        None if few else (fallback.rank, fallback.index or 0),
        healthy_rows,
        lambda done, name: tell(min(2 + done, total - 2), total, f"{name} alone"),
    )
    row = _suspect(rows)
    everything = len(rows) > 1 and not any(part.finite for part in rows)
    row = None if everything else row
    if row is not None:  # the row knows its rank and pass better than they do
        rank = next(part for part in ranks if part.rank == row.rank) if len(ranks) > 1 else None
        one_pass = next(part for part in passes if (part.rank, part.index) == (row.rank, row.index))
    token_part = row or max(rows, key=_loss)
    assert token_part.row is not None
    if (part := row or (None if everything else one_pass)) is not None:
        looked_at = f"{part.name} alone"
        rows_of_part = (
            scene.window.passes[part.rank][part.index or 0] if part.row is None else (part.row,)
        )
        pieces, states = _window(scene, rows_of_part), (scene.state.rng_states[part.rank],)
    else:
        looked_at, pieces, states = "the whole update", scene.window, scene.state.rng_states
    tell(total - 1, total, f"layers of {looked_at}")
    matrices, layer = inspect_layers(scene, healthy, pieces, states)
    return Bisection(
        ranks=ranks,
        passes=passes,
        rows=rows,
        rank=rank,
        one_pass=one_pass,
        row=row,
        everything=everything,
        healthy_rows=healthy_rows,
        looked_at=looked_at,
        matrices=matrices,
        layer=layer,
        token_row=token_part.name,
        tokens=token_losses(parts, scene.rows[token_part.row], packed=scene.window.packed),
    )


def _window(scene: Scene, rows: tuple[int, ...]) -> Window:
    """A window of one rank and one pass."""
    return replace(scene.window, rows=rows, passes=((rows,),))


def _rank_parts(scene: Scene, whole: Carried) -> tuple[Part, ...]:
    parts = [
        Part(
            f"rank {rank}", rank, None, None, scene.rank_tokens(rank), whole.rank_losses[rank], norm
        )
        for rank, norm in enumerate(whole.rank_grad_norms)
    ]
    return with_factors(parts)


def _pass_parts(scene: Scene) -> tuple[Part, ...]:
    """Compute every pass's own share.

    A rank's passes draw their random numbers one after the other, as in the update.
    """
    parts = []
    for rank, passes in enumerate(scene.window.passes):
        states = (scene.state.rng_states[rank],)
        for index, rows in enumerate(passes):
            carried = carry_out(
                scene.parts, scene.rows, _window(scene, rows), scene.supervised_tokens, states
            )
            states = carried.rng_after
            tokens = sum(scene.rows[row].supervised_tokens for row in rows)
            name = f"rank {rank}, pass {index}" if scene.ranks > 1 else f"pass {index}"
            parts.append(
                Part(name, rank, index, None, tokens, carried.rank_losses[0], carried.grad_norm)
            )
    return with_factors(parts)


def row_parts(
    scene: Scene,
    only: tuple[int, int] | None,
    healthy: tuple[float, float] | None = None,
    tell: Callable[[int, str], None] = lambda _done, _name: None,
) -> tuple[Part, ...]:
    """Each row alone, its share still divided by the update's N.

    Args:
        only: (rank, pass) whose rows are tried; None: all. healthy: median loss a token and
            gradient norm of a healthy update's rows.
    """
    parts = enter(scene)
    parts = []
    for rank, index, row in scene.places():
        if only is not None and (rank, index) != only:
            continue
        tell(len(parts), scene.row_names[row])
        carried = carry_out(
            scene.parts,
            scene.rows,
            _window(scene, (row,)),
            scene.supervised_tokens,
            (scene.state.rng_states[rank],),
        )
        tokens, loss = scene.rows[row].supervised_tokens, carried.rank_losses[0]
        above = (
            healthy is None
            or (loss or 0) >= LOSS_FACTOR * healthy[0]
            or carried.grad_norm >= NORM_FACTOR * healthy[1]
        )
        name = scene.row_names[row]
        parts.append(
            Part(name, rank, index, row, tokens, loss, carried.grad_norm, above_healthy=above)
        )
    return with_factors(parts)


def _medians(parts: Sequence[Part]) -> tuple[float, float] | None:
    losses = [part.loss_nats for part in parts if part.finite and part.loss_nats is not None]
    norms = [part.grad_norm for part in parts if part.finite]
    return (median(losses), median(norms)) if losses else None


def with_factors(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The parts with their factors and shares.

    Factors are over the median of the other parts, shares of the norms' sum.
    """
    total = sum(part.grad_norm for part in parts)

    def over(part: Part, field: str) -> float | None:
        others = [getattr(p, field) for p in parts if p is not part]
        others = [value for value in others if value is not None and math.isfinite(value)]
        own, middle = getattr(part, field), median(others) if others else 0.0
        return own / middle if own is not None and middle > 0 else None

    return tuple(
        replace(
            part,
            loss_factor=over(part, "loss_nats"),
            norm_factor=over(part, "grad_norm"),
            norm_share=part.grad_norm / total if total > 0 and math.isfinite(total) else None,
        )
        for part in parts
    )


def _weight(part: Part) -> float:
    """Orders parts by their trouble: not finite first, then by gradient norm."""
    return math.inf if not part.finite else part.grad_norm


def _loss(part: Part) -> float:
    return math.inf if not part.finite else part.loss_nats or 0.0


def _suspect(parts: Sequence[Part]) -> Part | None:
    """The part that stands out, or None.

    The first that is not finite, else the one with the largest norm.
    """
    out = [part for part in parts if part.stands_out]
    return max(out, key=_weight) if out and len(parts) > 1 else None


@torch.no_grad()
def token_losses(parts: Parts, row: Row, *, packed: bool) -> tuple[TokenLoss, ...]:
    """Cross-entropy of every supervised place of a row, alone in a pass.

    row_of counts places here instead of rows.
    """
    before = rng_state(parts.replica.device)
    p = build_pass([row], packed=packed, pad_id=parts.replica.pad_id, device=parts.replica.device)
    places = len(row)
    counting = torch.arange(places, device=parts.replica.device).unsqueeze(0)  # (1, T)
    _, losses = parts.replica.engine(
        replace(p, row_of=counting, row_ids=tuple(map(str, range(places))))
    )  # (T,)
    restore_rng(before, parts.replica.device)
    targets = p.targets[0].tolist()
    return tuple(
        TokenLoss(place + 1, target, loss)
        for place, (target, loss) in enumerate(zip(targets, losses.tolist(), strict=True))
        if target != IGNORE
    )
