"""A recorded update computed again on one process, and compared.

Each rank of the run becomes a virtual one with its own random numbers and passes; the shares of g
are summed in rank order. Passes go through the loop's own run_passes. Nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glassloop.data.batches import Window, build_pass
from glassloop.data.rows import Row
from glassloop.formula import optim
from glassloop.formula.optim import l2_norm
from glassloop.health.decision import clip_coefficient
from glassloop.replay.replica import Parts, StartState
from glassloop.saved import state as snapshots

ULP = 2.0**-23  # relative size of fp32's last bit
FLOOR_FACTOR = (
    4  # a number reproduces if it is off by at most so many times two replays' difference
)


@dataclass(frozen=True)
class Scene:
    """One update and its start state, to be run repeatedly."""

    parts: Parts  # `enter` puts right what they hold
    update: int
    window: Window  # passes hold indices into `rows`
    rows: Sequence[Row]
    row_names: tuple[str, ...]  # what to call them: their ids, or "row 17" under record.text = none
    state: StartState
    lr: float
    max_grad_norm: float | None
    recorded: Mapping[str, float]  # what is on record, under the names of `numbers`
    origin: str  # where the state comes from, for people
    updates_rerun: int = 0  # updates that were re-run to get here
    rounding: float = 0.0  # relative, that one process may differ by from ranks that shared passes

    @property
    def supervised_tokens(self) -> int:
        """N of the formula."""
        return sum(self.rows[row].supervised_tokens for row in self.window.rows)

    @property
    def ranks(self) -> int:
        return len(self.window.passes)

    def rank_tokens(self, rank: int) -> int:
        """Supervised tokens of one rank's rows."""
        return sum(
            self.rows[row].supervised_tokens for one in self.window.passes[rank] for row in one
        )

    def places(self) -> list[tuple[int, int, int]]:
        """(rank, pass, row) of every row, in order."""
        passes = self.window.passes
        return [
            (rank, index, row)
            for rank, of in enumerate(passes)
            for index, one in enumerate(of)
            for row in one
        ]


@dataclass(frozen=True)
class Carried:
    """The numbers of an update before the optimizer moved; losses in nats.

    The gradient itself, times the loss scale, is in the flat gradient.
    """

    loss_nats: float  # token mean over all ranks
    grad_norm: float  # of g, unscaled, before clipping
    rank_losses: tuple[float | None, ...]  # token means; None for a rank without supervised tokens
    rank_grad_norms: tuple[float, ...]
    # Sums over tokens, by rank, in the order of its passes.
    row_losses: tuple[tuple[float, ...], ...]
    rng_after: tuple[dict[str, Any], ...]  # by rank, after its passes

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss_nats) and math.isfinite(self.grad_norm)


def enter(
    scene: Scene, parts: Parts | None = None, moments: tuple[dict[str, Tensor], Any] | None = None
) -> Parts:
    """Put the parts into the state before the update, and return them.

    Args:
        parts: others for the same update.
        moments: state of their optimizer, if it is not the run's optimizer.
    """
    parts = parts or scene.parts
    replica, state = parts.replica, scene.state
    flat = replica.adapters.flat
    built = snapshots.built_optimizer_state(replica.optimizer, flat, *(moments or state.moments))
    with torch.no_grad():
        flat.copy_(state.flat)
    snapshots.set_optimizer_state(replica.optimizer, flat, built)
    replica.scale.value = state.loss_scale if replica.scale.enabled else 1.0
    replica.optimizer.param_groups[0]["lr"] = scene.lr
    return parts


def carry_out(
    parts: Parts,
    rows: Sequence[Row],
    window: Window,
    n: int,
    rng_states: Sequence[dict[str, Any]],
) -> Carried:
    """Run the passes of all ranks, one rank after the other.

    Their sum is in the flat gradient afterwards. Two shares add up to the same bits in any order;
    a collective of more ranks orders its sum itself. Raises ValueError if memory runs out.

    Args:
        rows: those that the window's passes are indices into. n: N of the formula.
    """
    from train_loop import run_passes

    replica = parts.replica
    grad = replica.adapters.grad
    losses, norms, row_losses, rng_after = [], [], [], []
    total: Tensor | None = None
    for rank, rng in enumerate(fitting_rng(rng_states, parts)):
        snapshots.restore_rng(rng, replica.device)
        replica.rank = rank
        replica.adapters.zero_grad()
        sums = run_passes(replica, rows, window, n)
        if sums.out_of_memory:
            raise ValueError(
                f"rank {rank}'s passes do not fit in this device's memory: "
                "use a larger one, or execution.checkpointing=true"
            )
        losses.append(sums.loss_sum.double().item())
        norms.append(l2_norm(grad).item() / replica.scale.value)
        row_losses.append(tuple(sums.row_loss_sums.double().tolist()))
        rng_after.append(snapshots.rng_state(replica.device))
        if len(rng_states) > 1:
            total = grad.clone() if total is None else total.add_(grad)
    if total is not None:
        grad.copy_(total)
    tokens = [sum(rows[row].supervised_tokens for one in of for row in one) for of in window.passes]
    means = (loss / count if count else None for loss, count in zip(losses, tokens, strict=True))
    return Carried(
        loss_nats=sum(losses) / n,
        grad_norm=l2_norm(grad).item() / replica.scale.value,
        rank_losses=tuple(means),
        rank_grad_norms=tuple(norms),
        row_losses=tuple(row_losses),
        rng_after=tuple(rng_after),
    )


def fitting_rng(rng_states: Sequence[dict[str, Any]], parts: Parts) -> Iterator[dict[str, Any]]:
    """The ranks' random numbers, as this device takes them.

    This device's own if they come from another kind of device and nothing is drawn.
    """
    for state in rng_states:
        foreign = (state.get("cuda") is None) != (parts.replica.device.type != "cuda")
        if foreign and parts.config.lora.dropout > 0:
            raise ValueError(
                f"lora.dropout = {parts.config.lora.dropout}: dropout masks of a run on "
                f"{'CPUs' if state.get('cuda') is None else 'GPUs'} "
                f"cannot be drawn again on {parts.replica.device.type}: replay it on the "
                "kind of device that it was made on"
            )
        yield snapshots.rng_state(parts.replica.device) if foreign else state


@torch.no_grad()
def loss_now(
    parts: Parts,
    rows: Sequence[Row],
    window: Window,
    n: int,
    rng_states: Sequence[dict[str, Any]],
) -> float:
    """Token mean of the window's loss with the present adapters, in nats.

    Passes and dropout masks are those of the update.
    """
    total = 0.0
    replica = parts.replica
    for passes, rng in zip(window.passes, fitting_rng(rng_states, parts), strict=True):
        snapshots.restore_rng(rng, replica.device)
        for numbers in passes:
            p = build_pass(
                [rows[number] for number in numbers],
                packed=window.packed,
                pad_id=replica.pad_id,
                device=replica.device,
            )
            loss_sum, _ = replica.engine(p)
            total += loss_sum.double().item()
    return total / n


def step(parts: Parts, clip: float) -> None:
    """theta <- optimizer(theta, clip * g), as the loop does it."""
    replica = parts.replica
    if clip != replica.scale.value:
        replica.adapters.grad.mul_(clip / replica.scale.value)
    optim.step(replica.optimizer, replica.adapters)


def clip_of(scene: Scene, norm: float) -> float:
    """c of the formula."""
    return clip_coefficient(norm, scene.max_grad_norm)


def replayed(scene: Scene) -> Carried:
    """The update from its state; nothing is applied."""
    parts, n = enter(scene), scene.supervised_tokens
    return carry_out(parts, scene.rows, scene.window, n, scene.state.rng_states)


@dataclass(frozen=True)
class Compared:
    """One recorded number beside what the replay gave."""

    name: str
    recorded: float
    replayed: float
    # |difference| relative to the recorded number; 0 where both are the same, or not finite in the
    # same way
    off: float
    # FLOOR_FACTOR x what two replays differ by in this number (fp32's last bit at least), x updates
    # re-run
    allowed: float

    @property
    def reproduces(self) -> bool:
        return self.off <= self.allowed


@dataclass(frozen=True)
class Reproduction:
    """The update twice, beside its record."""

    first: Carried
    loss_floor: float  # relative difference of the loss of two replays
    norm_floor: float
    grad_floor: float  # L2 distance of their gradients, relative
    compared: tuple[Compared, ...]

    @property
    def reproduces(self) -> bool | None:
        """None: nothing is on record to compare with."""
        return all(c.reproduces for c in self.compared) if self.compared else None

    @property
    def bit_for_bit(self) -> bool:
        return all(c.off == 0 for c in self.compared)


def relative(a: float, b: float) -> float:
    """|a - b| over |b|; infinite if only one is finite."""
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / abs(b) if b else math.inf


def reproduce(scene: Scene) -> Reproduction:
    """Carry the update out twice, and compare the first with the record."""
    first = replayed(scene)
    grad = scene.parts.replica.adapters.grad.clone()
    second = replayed(scene)
    apart = relative_distance(scene.parts.replica.adapters.grad, grad)
    pairs = list(zip(numbers(scene, first), numbers(scene, second), strict=True))
    floors = {name: relative(other, value) for (name, value), (_, other) in pairs}
    # Where two replays are not the same bit for bit, a number that came out the same twice did so
    # by luck: its last bit may still differ.
    least = scene.rounding or (0.0 if apart == 0 and not any(floors.values()) else ULP)
    compared = []
    for name, value in numbers(scene, first):
        if (recorded := scene.recorded.get(name)) is not None:
            allowed = FLOOR_FACTOR * max(floors[name], least) * (1 + scene.updates_rerun)
            compared.append(Compared(name, recorded, value, relative(value, recorded), allowed))
    return Reproduction(first, floors["loss"], floors["gradient norm"], apart, tuple(compared))


def relative_distance(a: Tensor, b: Tensor) -> float:
    """L2 distance of two gradients, relative to the second.

    0 if both hold the same bits.
    """
    if torch.equal(a.view(torch.int32), b.view(torch.int32)):
        return 0.0
    distance, size = l2_norm(a.double() - b.double()).item(), l2_norm(b).item()
    return distance / size if size else math.inf


def numbers(scene: Scene, carried: Carried) -> Iterator[tuple[str, float]]:
    """The numbers to compare with the record, each under its name.

    Losses in nats: token means, but sums for rows.
    """
    yield "loss", carried.loss_nats
    yield "gradient norm", carried.grad_norm
    for rank in range(scene.ranks if scene.ranks > 1 else 0):
        loss = carried.rank_losses[rank]
        if loss is not None:
            yield f"loss of rank {rank}", loss
            yield f"norm of rank {rank}", carried.rank_grad_norms[rank]
    losses = [loss for rank in carried.row_losses for loss in rank]
    for (_, _, row), loss in zip(scene.places(), losses, strict=True):
        yield f"loss of {scene.row_names[row]}", loss


def recorded_numbers(
    scene: Scene,
    loss: float | None,
    norm: float | None,
    rank_losses: Sequence[float | None],
    rank_norms: Sequence[float] | None,
    row_losses: Sequence[float],
) -> dict[str, float]:
    """The record's numbers under the names of `numbers`.

    What is not on record is left out.
    """
    found: dict[str, float | None] = {"loss": loss, "gradient norm": norm}
    if scene.ranks > 1:
        found |= {f"loss of rank {rank}": value for rank, value in enumerate(rank_losses)}
        found |= {f"norm of rank {rank}": value for rank, value in enumerate(rank_norms or ())}
    if row_losses:
        places = scene.places()
        found |= {
            f"loss of {scene.row_names[row]}": value
            for (_, _, row), value in zip(places, row_losses, strict=True)
        }
    return {name: float(value) for name, value in found.items() if value is not None}
