"""The collectives of an update.

One gather (the gate), one sum of gradients, and two checks that replicas are equal. Every function
works on one rank without a process group. Legend: K numbers of one rank's report, R rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class RankReport:
    """One rank's report in the gate, before anything is reduced.

    Counts are of what it really computed.
    """

    whole: bool  # all passes done; False: out of memory, or a stop was asked in mid-update
    out_of_memory: bool
    stop: bool  # a signal asked this rank to end the run
    capture: bool  # a signal asked this rank to keep the update whole
    passes: int
    rows: int
    supervised_tokens: int
    real_tokens: int
    slot_tokens: int
    passes_s: float  # until its passes were done and it began to wait for the other ranks
    peak_gib: float  # largest allocation so far; 0 without a GPU
    loss_sum: float  # nats, summed over the rank's supervised tokens
    grad_norm: float  # of the rank's share of the gradient, still times the loss scale
    checksum: int  # of adapters and optimizer state before this update
    largest_weight: float  # of the adapters before this update, by magnitude; inf or NaN if one is
    row_loss_sums: tuple[float, ...]  # nats, in the order of the rank's rows
    machine: tuple[float, ...] = ()  # readings of the machine, equally many on all ranks


KINDS: dict[str, Callable[[float], float]] = {"bool": bool, "int": int, "float": float}
NUMBERS = {field.name: KINDS[str(field.type)] for field in fields(RankReport)[:-2]}


@dataclass(frozen=True)
class Gate:
    """All ranks' reports, in rank order, the same on every rank."""

    reports: tuple[RankReport, ...]

    @property
    def whole(self) -> bool:
        return all(report.whole for report in self.reports)

    @property
    def out_of_memory(self) -> tuple[int, ...]:
        """Ranks that ran out of memory."""
        return tuple(rank for rank, report in enumerate(self.reports) if report.out_of_memory)

    @property
    def stop(self) -> bool:
        return any(report.stop for report in self.reports)

    @property
    def capture(self) -> bool:
        return any(report.capture for report in self.reports)

    @property
    def loss_sum(self) -> float:
        return sum(report.loss_sum for report in self.reports)

    @property
    def replicas_agree(self) -> bool:
        return len({report.checksum for report in self.reports}) == 1


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_reports(own: RankReport, rows_of_ranks: Sequence[int]) -> Gate:
    """Exchange the ranks' reports.

    One small all-gather of float64, and one read by the host.

    Args:
        own: this rank's report; it may lack rows whose passes were not finished, they count as 0.
        rows_of_ranks: how many rows each rank has in this window, known to all.
    """
    numbers = [getattr(own, name) for name in NUMBERS]
    missing = [0.0] * (max(rows_of_ranks) - len(own.row_loss_sums))
    packed = torch.tensor(  # (K,)
        [*numbers, *own.machine, *own.row_loss_sums, *missing], dtype=torch.float64
    )
    reports = []
    for rows, told in zip(rows_of_ranks, _all_gather(packed).tolist(), strict=True):
        plain: list[Any] = [kind(x) for kind, x in zip(NUMBERS.values(), told, strict=False)]
        rest = told[len(plain) :]
        machine, losses = rest[: len(own.machine)], rest[len(own.machine) :][:rows]
        reports.append(RankReport(*plain, row_loss_sums=tuple(losses), machine=tuple(machine)))
    return Gate(tuple(reports))


def _all_gather(values: Tensor) -> Tensor:
    """(ranks, K) from each rank's (K,)."""
    if not is_distributed():
        return values.unsqueeze(0)
    values = values.cpu() if dist.get_backend() == "gloo" else values.cuda()
    gathered = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, values)
    return torch.stack(gathered)


def first_difference(parts: Sequence[tuple[str, Tensor]], bit_sums: Tensor) -> str:
    """Name the first entry in which replicas differ, with each rank's value.

    All ranks take part.

    Args:
        parts: (name, flat tensor) of everything that replicas share, the same names and sizes on
            every rank.
        bit_sums: (K,) int64, an exact checksum of each part on this rank.
    """
    sums = _all_gather(bit_sums)  # (ranks, K)
    differing = (sums != sums[0]).any(dim=0).nonzero().flatten().tolist()
    if not differing:
        return (
            "every parameter has an equal sum of bits: the difference is in a table that they share"
        )
    name, tensor = parts[differing[0]]
    values = _all_gather(tensor.contiguous())  # (ranks, entries)
    bits = values.view(torch.int32) if values.element_size() == 4 else values
    entries = (bits != bits[0]).any(dim=0).nonzero().flatten()
    held = ", ".join(
        f"rank {rank}: {value:.9g}"
        for rank, value in enumerate(values[:, int(entries[0])].tolist())
    )
    also = (
        f"; {len(entries) - 1:,} more entries of it and {len(differing) - 1:,} more tensors differ"
    )
    return f"{name}, entry {int(entries[0]):,} is the first ({held}){also}"


def reduce_gradients(grad: Tensor) -> None:
    """Sum the flat gradient over ranks, in place.

    Afterwards `grad` is the g of the formula on every rank.
    """
    if is_distributed():
        dist.all_reduce(grad, op=dist.ReduceOp.SUM)


def broadcast_from_rank_0(values: Tensor) -> Tensor:
    """Give every rank rank 0's values, in place; returns them."""
    if is_distributed():
        dist.broadcast(values, src=0)
    return values


def require_same(what: str, value: int | float | str, cure: str) -> None:
    """Raise ValueError on every rank unless all ranks hold the same `value`."""
    values = gather_objects(value)
    if len(set(values)) > 1:
        held = ", ".join(f"rank {rank}: {held}" for rank, held in enumerate(values))
        raise ValueError(f"ranks hold different {what} ({held}): {cure}")


def leave() -> None:
    """End the process group, if there is one.

    gloo's threads abort a process that exits without it.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def gather_objects(value: object) -> list:
    """Each rank's value, in rank order, on every rank."""
    if not is_distributed():
        return [value]
    values: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


FAULTS = (ValueError, OSError, RuntimeError)  # what a user gave; the disk; anything else


@contextlib.contextmanager
def all_or_none(what: str) -> Iterator[None]:
    """Run a block on every rank; if one fails, all raise.

    The error names the rank that failed, and no rank waits for it.

    A rank whose own block went well raises ValueError where the others only refused what a user
    gave (ValueError), OSError where they met the disk too, else RuntimeError.
    """
    failure: BaseException | None = None
    try:
        yield
    except Exception as error:
        failure = error
    mine = (
        None
        if failure is None
        else (
            next((kind for kind in FAULTS if isinstance(failure, kind)), RuntimeError),
            f"{type(failure).__name__}: {failure}",
        )
    )
    failures = gather_objects(mine)
    if failure is not None:
        raise failure
    broken = {rank: told for rank, told in enumerate(failures) if told is not None}
    if broken:
        kind = max((kind for kind, _ in broken.values()), key=FAULTS.index)
        told = "; ".join(f"rank {rank}: {text}" for rank, (_, text) in broken.items())
        raise kind(f"{what} failed on another rank ({told})")


@contextlib.contextmanager
def one_first(is_first: bool) -> Iterator[None]:
    """A block that one rank of each host runs before the others.

    All ranks take part, whatever happens in the block.

    Accelerate's own names a GPU by the rank's place on its host, which two ranks that share a card
    do not have.
    """
    if not is_first:
        gather_objects(None)
    try:
        yield
    finally:
        if is_first:
            gather_objects(None)


def in_turn(
    first: Callable[[], AbstractContextManager[Any]], action: Callable[[], T], what: str
) -> T:
    """Call `action` on one rank of each host before the others.

    Returns what it returns. If it fails on a rank, every rank raises and none waits.
    """
    failure: Exception | None = None
    result: list[T] = []
    with first():
        try:
            result.append(action())
        except Exception as error:
            failure = error
    with all_or_none(what):
        if failure is not None:
            raise failure
    return result[0]


def rank_cosine(norms: Sequence[float], total: float) -> float | None:
    """Mean cosine between ranks' shares of the gradient, weighted by their norms.

    From |sum g_r|^2 = sum |g_r|^2 + sum over pairs of 2 |g_r| |g_s| cos. None with one rank, or
    where fewer than two ranks have a gradient.
    """
    # Sum over ordered pairs of |g_r| |g_s|.
    products = sum(norms) ** 2 - sum(norm * norm for norm in norms)
    if len(norms) < 2 or products <= 0:
        return None
    return (total * total - sum(norm * norm for norm in norms)) / products
