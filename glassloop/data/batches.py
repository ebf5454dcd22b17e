"""Rows of each update, and the passes that each rank computes.

The order is a function of seed and epoch alone. So every rank knows every window without asking,
and update u can be rebuilt at any time. Legend: B rows, T tokens.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch

from glassloop.data.rows import IGNORE, Part, Pass, Row
from glassloop.data.stored import lengths_of, supervised_of
from glassloop.data.templates import targets
from glassloop.plan.split import places_of_ranks
from glassloop.plan.steps import StepPlan

CLOSE = 0.002  # of two ranks' tokens: a difference that nobody waits for


@dataclass(frozen=True)
class Window:
    """The rows of one update, and for each rank its passes.

    Rows are indices into the training rows. `split`: all ranks compute rank 0's passes together.
    """

    update: int
    epoch: int
    rows: tuple[int, ...]
    passes: tuple[tuple[tuple[int, ...], ...], ...]  # [rank][pass][row]
    packed: bool
    split: bool = False

    def computed_by(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """Passes that a rank takes part in."""
        return self.passes[0 if self.split else rank]


@lru_cache(maxsize=4)
def epoch_order(rows: int, seed: int, epoch: int) -> array[int]:
    """Permutation of range(rows), a function of its arguments alone.

    Python's own generator is stable over versions.
    """
    order = list(range(rows))
    random.Random(f"rows:{seed}:{epoch}").shuffle(order)
    return array("i", order)  # a list of a million numbers has 40 MB


def literal_passes(
    rows: Sequence[int], size: int, ranks: int
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Exactly the micro-batches asked for.

    Micro-batch m of rank r takes rows [(m * ranks + r) * size, ... + size).
    """
    chunks = [tuple(rows[start : start + size]) for start in range(0, len(rows), size)]
    return tuple(tuple(chunks[rank::ranks]) for rank in range(ranks))


def dealt(rows: Sequence[int], lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Deal rows to ranks so that their tokens are about equal.

    The longest row goes first, to the lightest rank. Then the heaviest and the lightest rank share
    their rows anew, as long as they differ by more than CLOSE and that brings them closer. No
    division of two ranks' rows is more equal.

    Returns each rank's rows, the longest first.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        rank = loads.index(min(loads))
        shares[rank].append(row)
        loads[rank] += lengths[row]
    while True:
        high, low = loads.index(max(loads)), loads.index(min(loads))
        gap, both = loads[high] - loads[low], loads[high] + loads[low]
        if gap <= CLOSE * both:
            return shares
        less, more = halves(sorted([*shares[high], *shares[low]]), lengths)
        found = [sum(lengths[row] for row in half) for half in (less, more)]
        if found[1] - found[0] >= gap:
            return shares
        for rank, half, load in zip((low, high), (less, more), found, strict=True):
            shares[rank], loads[rank] = sorted(half, key=lambda row: (-lengths[row], row)), load


def halves(rows: Sequence[int], lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Divide rows in two so that their tokens differ least.

    The lighter half comes first.
    """
    sums = [1]  # bit s of sums[n]: some of the first n rows have s tokens
    for row in rows:
        sums.append(sums[-1] | sums[-1] << lengths[row])
    half = sum(lengths[row] for row in rows) // 2
    left = (sums[-1] & ((1 << half + 1) - 1)).bit_length() - 1
    less, more = list[int](), list[int]()
    for row, without in zip(reversed(rows), reversed(sums[:-1]), strict=True):
        if without >> left & 1:
            more.append(row)
        else:
            less.append(row)
            left -= lengths[row]
    return less, more


def packed_passes(
    rows: Sequence[int], lengths: Sequence[int], ranks: int, pass_tokens: int
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """The same rows in few passes of at most `pass_tokens` tokens.

    A rank's longest row goes first, into the first pass with room.
    """
    result = []
    for share in dealt(rows, lengths, ranks):
        bins: list[list[int]] = []
        room: list[int] = []
        for row in share:
            fit = next((i for i, left in enumerate(room) if lengths[row] <= left), None)
            if fit is None:
                bins.append([row])
                room.append(pass_tokens - lengths[row])
            else:
                bins[fit].append(row)
                room[fit] -= lengths[row]
        result.append(tuple(tuple(b) for b in bins))
    return tuple(result)


@dataclass(frozen=True)
class Batches:
    """All windows of a run, by number."""

    rows: Sequence[Row]
    plan: StepPlan
    seed: int
    layout: str  # "literal" | "packed" | "split"
    pass_tokens: int  # packed only: most tokens of a pass
    # Updates after which a lone rank's only packed pass is cut in two, for the noise scale.
    two_passes_every: int | None = None
    halvings: int = 0  # how often passes were cut in two since they did not fit into memory

    @cached_property
    def lengths(self) -> array[int]:
        """Tokens of each row."""
        return lengths_of(self.rows)

    @cached_property
    def labels(self) -> array[int]:
        """Supervised tokens of each row."""
        return supervised_of(self.rows)

    def rows_of(self, update: int) -> tuple[int, ...]:
        """Rows of update u = 1, 2, ..."""
        plan = self.plan
        epoch, place = divmod(update - 1, plan.windows_per_epoch)
        order = epoch_order(len(self.rows), self.seed, epoch)
        return tuple(order[place * plan.rows_per_update : (place + 1) * plan.rows_per_update])

    def window(self, update: int) -> Window:
        """Window of update u = 1, 2, ..."""
        plan, rows = self.plan, self.rows_of(update)
        epoch = (update - 1) // plan.windows_per_epoch
        if self.layout == "literal":
            passes = literal_passes(rows, plan.size, plan.ranks)
        elif self.layout == "split":
            together = packed_passes(rows, self.lengths, 1, self.pass_tokens)
            passes = (*together, *((),) * (plan.ranks - 1))
        else:
            passes = packed_passes(rows, self.lengths, plan.ranks, self.pass_tokens)
            if (
                self.two_passes_every
                and update % self.two_passes_every == 0
                and plan.ranks == len(passes[0]) == 1
            ):
                passes = (tuple(half for half in (passes[0][0][::2], passes[0][0][1::2]) if half),)
        for _ in range(self.halvings):
            passes = tuple(
                tuple(half for one in rank for half in (one[::2], one[1::2]) if half)
                for rank in passes
            )
        return Window(update, epoch, rows, passes, packed=self.packed, split=self.split)

    @property
    def packed(self) -> bool:
        """True if rows of a pass lie end to end."""
        return self.layout != "literal"

    @property
    def split(self) -> bool:
        """True if ranks share each pass."""
        return self.layout == "split" and self.plan.ranks > 1

    def heaviest(self) -> Window:
        """Each rank's pass with the most slot tokens, as window 0."""
        heaviest: list[tuple[int, tuple[int, ...]]] = [(0, ())] * self.plan.ranks
        for update in range(1, self.plan.updates + 1):
            for rank, passes in enumerate(self.window(update).passes):
                heaviest[rank] = max([heaviest[rank], *((self.slots(one), one) for one in passes)])
        passes = tuple((one,) if one else () for _, one in heaviest)
        return Window(
            0,
            0,
            tuple(row for rank in passes for one in rank for row in one),
            passes,
            packed=self.packed,
            split=self.split,
        )

    def slots(self, rows: Sequence[int]) -> int:
        """Slot tokens of a pass."""
        lengths = [self.lengths[row] for row in rows]
        return sum(lengths) if self.packed else len(rows) * max(lengths)

    def share(self, window: Window, rank: int) -> list[Row]:
        """The rows of one rank, in the order of its passes."""
        return [self.rows[row] for one in window.passes[rank] for row in one]

    def supervised_tokens(self, window: Window) -> int:
        """N of the formula: supervised tokens of a window, all ranks."""
        return sum(self.labels[row] for row in window.rows)


def build_pass(
    rows: Sequence[Row],
    *,
    packed: bool,
    pad_id: int,
    device: torch.device,
    share: tuple[int, int] | None = None,
) -> Pass:
    """Tensors of one pass.

    Padded: right padding to the longest row. Packed: rows end to end, positions restart. `share`:
    rank and ranks of a packed pass that all of them compute together; a place's target is the token
    that follows, whichever rank has it.
    """
    assert share is None or packed, "ranks share packed passes alone"
    lengths = [len(row) for row in rows]
    shape = (1, sum(lengths)) if packed else (len(rows), max(lengths))
    whole = np.empty((4, *shape), dtype=np.int64)  # one copy to the device
    whole[0], whole[1] = pad_id, IGNORE
    start = 0
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        place = (0, slice(start, start + length)) if packed else (index, slice(0, length))
        own = place if packed else index  # padding counts on from its row
        whole[0][place], whole[1][place] = row.input_ids, targets(row)
        whole[2][own], whole[3][own] = np.arange(length if packed else shape[1]), index
        start += length
    part = None
    if share is not None and share[1] > 1:
        whole, part = _part(whole, *share)
    tensors = torch.from_numpy(whole)  # (4, B, T)
    places = (tensors[1].flatten() != IGNORE).nonzero().squeeze(1)
    supervised = len(places) if part is None or not part.idle else 0
    if device.type == "cuda":
        tensors, places = tensors.pin_memory(), places.pin_memory()
    on_device = tensors.to(device, non_blocking=True)
    return Pass(
        row_ids=tuple(row.row_id for row in rows),
        input_ids=on_device[0],
        targets=on_device[1],
        position_ids=on_device[2],
        row_of=on_device[3],
        places=places.to(device, non_blocking=True),
        lengths=tuple(lengths),
        packed=packed,
        supervised_tokens=supervised,
        real_tokens=sum(lengths) if part is None else tensors[0].numel(),
        slot_tokens=tensors[0].numel(),
        part=part,
    )


def _part(whole: np.ndarray, rank: int, ranks: int) -> tuple[np.ndarray, Part]:
    """One rank's places of a packed pass (4, 1, T)."""
    places = places_of_ranks(whole.shape[2], ranks)
    start = sum(places[:rank])
    own = np.ascontiguousarray(whole[:, :, start : start + places[rank]])
    idle = bool((own[1] == IGNORE).all())
    if idle:
        own[1, 0, 0] = 0  # a label that exists, at a place that counts as 0
    return own, Part(rank, places, idle)


def empty_pass(row: Row, *, pad_id: int, device: torch.device) -> Pass:
    """A pass without any supervised place.

    For a rank that has no rows while others wait for its gradient (DDP).
    """
    unsupervised = Row(row.row_id, row.input_ids[:8], (False,) * len(row.input_ids[:8]))
    built = build_pass([unsupervised], packed=False, pad_id=pad_id, device=device)
    return replace(built, real_tokens=0, slot_tokens=0)
