"""Judges whether a run fits a card, and names settings that do.

The ledger's peak counts, and what lies outside of torch's counters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from glassloop.predict.choice import describe
from glassloop.predict.hardware import Gpu
from glassloop.predict.ledger import ledger_of
from glassloop.predict.longest import RowSpeed, longest_row, row_speeds
from glassloop.predict.shapes import Shapes
from glassloop.predict.spend import with_tiers
from glassloop.predict.terms import GIB, Work, tiers_of
from glassloop.predict.tiers import FRAGMENTATION, Tiers

CONTEXT_GIB = 0.5  # CUDA context with the kernels of torch, cuBLAS and bitsandbytes loaded
NCCL_GIB = 0.3  # its buffers, where there is more than one rank


@dataclass(frozen=True)
class Verdict:
    """A judgement of one card.

    Attributes:
        needed_gib: peak, fragmentation, context and NCCL, as asked. has_gib: the card's memory,
            or what is free of it.
        least_gib: the same with one row a pass and as few activations kept as the engine can do
            with.
        cure: fields that make it fit with the same rows an update, where it does not; None
            if nothing does or nothing is needed.
        cure_gib: what is needed then.
        faster: fields with which activations are stored, where that fits too and was not asked
            for; None otherwise. faster_gib: what that needs.
        note: what a reader should know beside the numbers.
        kept, held, streamed, host, chunk, pass_tokens, tiers: of the engine `fused` on this card:
            layers kept whole, held in 16 bits and streamed from the host; what the others leave on
            the host; places that products take at a time (0: all); tokens of its heaviest pass;
            and the same in words. None and "" for other engines.
        longest_tokens: of the longest row that `fused` trains there, alone in its pass;
            longest_host_gib: host memory that it locks then; longest_tiers: how it does.
        rows: long rows that fit, and their speed.
    """

    card: str
    fits: bool
    needed_gib: float
    has_gib: float
    cure: str | None
    cure_gib: float | None
    faster: str | None
    faster_gib: float | None
    note: str = ""
    kept: int | None = None
    held: int | None = None
    streamed: int | None = None
    host: str | None = None
    chunk: int | None = None
    pass_tokens: int | None = None
    tiers: str = ""
    least_gib: float | None = None
    longest_tokens: int | None = None
    longest_host_gib: float | None = None
    longest_tiers: str = ""
    rows: tuple[RowSpeed, ...] = ()

    @property
    def spare_gib(self) -> float:
        """GiB that the run as asked leaves free."""
        return self.has_gib - self.needed_gib


def least_work(work: Work) -> Work:
    """The same rows in the smallest passes, with the fewest activations.

    The base streams unless it was asked to stay.
    """
    base = "host" if work.base == "auto" else work.base
    small = replace(work, checkpointing=True, profile="min", base=base)
    if work.between is not None:
        return replace(small, tokens=work.between[0], between=None)
    if work.packed:
        return small
    return replace(small, rows=1, supervised_tokens=_share(work, 1))


def budget_bytes(has_gib: float, ranks: int) -> int:
    """Bytes of a card that torch's allocator may take on a rank."""
    return int((has_gib - CONTEXT_GIB - (NCCL_GIB if ranks > 1 else 0.0)) * GIB)


def needed_gib(shapes: Shapes, work: Work, ranks: int, engine: str = "peft") -> float:
    """GiB of a card that a rank takes."""
    peak = ledger_of(shapes, work, engine).peak_bytes / GIB
    return peak * (1 + FRAGMENTATION) + CONTEXT_GIB + (NCCL_GIB if ranks > 1 else 0.0)


def verdict(
    gpu: Gpu,
    shapes: Shapes,
    work: Work,
    *,
    ranks: int,
    rows_per_update: int,
    free_gib: float | None = None,
    engine: str = "peft",
) -> Verdict:
    """Judge one card.

    `free_gib`: what nvidia-smi says is free now, of a card that is present (a context is not yet
    part of it).
    """
    work = replace(work, capability=gpu.capability)
    note = (
        ""
        if gpu.has_bf16 or work.precision != "bf16"
        else "no bf16 units: execution.precision=fp16"
    )
    has = gpu.usable_gib if free_gib is None else free_gib

    def carried_out(one: Work) -> Work:
        return with_tiers(shapes, one, budget_bytes(has, ranks)) if engine == "fused" else one

    def needs(one: Work) -> float:
        return needed_gib(shapes, carried_out(one), ranks, engine)

    asked, least = needs(work), needs(least_work(work))
    found = Verdict(gpu.key, asked <= has, asked, has, None, None, None, None, note)
    found = replace(found, least_gib=min(least, asked))
    if engine == "fused":
        how = carried_out(work)
        tiers = tiers_of(shapes, how)
        found = replace(
            found,
            kept=tiers.kept,
            held=tiers.held,
            streamed=tiers.streamed,
            host=tiers.host,
            chunk=tiers.chunk,
            pass_tokens=how.places,
            tiers=describe(tiers, shapes.layers, sharded=work.base == "sharded"),
        )
        found = _with_longest(found, shapes, work, budget_bytes(has, ranks))
        if found.fits:
            return _with_more(found, shapes, work, tiers, needs, carried_out)
        work = replace(how, tiers=None)
    kept = f"batch.rows_per_update={rows_per_update}"
    for fields, smaller in (
        smaller_settings(work, ranks=ranks, rows_per_update=rows_per_update) if asked > has else ()
    ):
        needed = needs(smaller)
        if needed <= has:
            return replace(found, cure=fields, cure_gib=needed)
    if work.checkpointing and asked <= has:
        stored, off = replace(work, checkpointing=False), "execution.checkpointing=false"
        for size in range(work.rows, 0, -1):
            needed = needs(replace(stored, rows=size, supervised_tokens=_share(work, size)))
            if needed <= has and (
                size == work.rows or (not work.packed and rows_per_update % (size * ranks) == 0)
            ):
                fields = off if size == work.rows else f"{off} batch.size={size} {kept}"
                return replace(found, faster=fields, faster_gib=needed)
    return found


def _with_longest(found: Verdict, shapes: Shapes, work: Work, budget: int) -> Verdict:
    """A verdict of `fused`, with the longest row."""
    longest = longest_row(shapes, work, budget)
    return replace(
        found,
        longest_tokens=longest.tokens,
        longest_host_gib=longest.host.total_bytes / GIB,
        longest_tiers=describe(longest.tiers, shapes.layers).partition(", ")[2],
        rows=row_speeds(found.card, shapes, work, budget, longest.tokens),
    )


def _with_more(
    found: Verdict,
    shapes: Shapes,
    work: Work,
    tiers: Tiers,
    needs: Callable[[Work], float],
    carried_out: Callable[[Work], Work],
) -> Verdict:
    """A fitting verdict of `fused`, with what a larger profile keeps."""
    filled = replace(work, profile="fill")
    more = tiers_of(shapes, carried_out(filled)).kept
    if work.profile == "fill" or more <= tiers.kept or needs(filled) > found.has_gib:
        return found
    return replace(
        found,
        faster=f"memory.profile=fill, {more} of {shapes.layers} layers kept",
        faster_gib=needs(filled),
    )


def smaller_settings(work: Work, *, ranks: int, rows_per_update: int) -> Sequence[tuple[str, Work]]:
    """Settings that need less memory and keep the rows of an update.

    (fields, work), in the order in which one would try them. First what changes no term of the
    update's gradient (recomputation, smaller micro-batches or passes), then NF4 for an unquantised
    base.
    """
    kept = f"batch.rows_per_update={rows_per_update}"
    if work.packed:
        smaller = [max(work.tokens // part, work.longest_row) for part in (2, 4)]
        sizes = [
            (f"execution.pass_tokens={size}", replace(work, tokens=size))
            for size in dict.fromkeys(smaller)
            if size < work.tokens
        ]
    else:
        smaller = [
            size for size in range(work.rows - 1, 0, -1) if rows_per_update % (size * ranks) == 0
        ]
        sizes = [
            (
                f"batch.size={size} {kept}",
                replace(work, rows=size, supervised_tokens=_share(work, size)),
            )
            for size in smaller
        ]
    found = list(sizes)
    if not work.checkpointing:
        on = "execution.checkpointing=true"
        found = [(on, replace(work, checkpointing=True)), *found]
        found += [(f"{fields} {on}", replace(other, checkpointing=True)) for fields, other in sizes]
    if work.base not in ("auto", "host") and work.quantization == "nf4":
        found.append(("memory.base=auto", replace(work, base="auto")))
    if work.quantization == "none":
        as_nf4 = [
            ("model.quantization=nf4", work),
            *((f"{fields} model.quantization=nf4", other) for fields, other in found),
        ]
        found += [(fields, replace(other, quantization="nf4")) for fields, other in as_nf4]
    return found


def _share(work: Work, rows: int) -> int | None:
    return (
        None if work.supervised_tokens is None else -(-work.supervised_tokens * rows // work.rows)
    )
