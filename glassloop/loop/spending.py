"""Memory tiers of a run on `fused`.

They are chosen at its start and lowered when memory runs out.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from glassloop.formula.dist import gather_objects
from glassloop.loop.replica import card_name
from glassloop.predict.choice import Asked, Base, describe
from glassloop.predict.chunks import CHUNKS
from glassloop.predict.host import host_ledger, spare_bytes
from glassloop.predict.terms import GIB
from glassloop.predict.tiers import HOSTS, Tiers, room_bytes

if TYPE_CHECKING:
    from glassloop.config import MemoryConfig
    from glassloop.loop.run import Run


def ranks_on(device: torch.device) -> int:
    """Count the ranks that share this rank's device. All take part."""
    own = f"{socket.gethostname()} {card_name(device)}"
    return gather_objects(own).count(own)


def make_lean(engine: Any, memory: MemoryConfig) -> None:
    """Send the embedding to the host before anything is computed.

    Under `fused` and memory.profile=min, where it goes there anyway: the check of the engine would
    need more memory than any pass. It stays where the system locks nothing and nobody asked for it:
    the choice of tiers says so then.
    """
    if engine.name == "fused" and memory.profile == "min" and memory.host_gib != 0:
        with suppress(ValueError) if memory.host_gib == "auto" else nullcontext():
            engine.send_embedding_away()


def spend_memory(run: Run) -> None:
    """Choose how many layers keep activations, equal on all ranks.

    Only `fused` can.

    A resumed run takes what its checkpoint has, as long as the ranks have room for it.
    """
    engine = run.replica.plain_engine
    if engine.name != "fused":
        return
    if not run.config.execution.checkpointing:
        place_base(engine, run.config.memory.base)
        return
    window = run.batches.heaviest()
    passes = [[run.batches.rows[row] for row in one] for rank in window.passes for one in rank]
    tokens = max(run.batches.slots(one) for rank in window.passes for one in rank)
    supervised = max(sum(row.supervised_tokens for row in one) for one in passes)
    if run.batches.split:  # of a rank; all labels may lie in one rank's part
        tokens = -(-tokens // run.replica.ranks)
        supervised = min(supervised, tokens)
    memory = run.config.memory
    # What is held is given back before free memory is counted.
    engine.use_tiers(replace(engine.tiers, host="nothing", held=0))
    asked = Asked(
        memory.profile,
        tokens,
        supervised,
        host_bytes=host_bytes_of(engine, memory.host_gib),
        base=memory.base,
        sharing=ranks_on(run.replica.device),
        longest=max(len(row) for one in passes for row in one),
        split=run.replica.ranks if run.batches.split else 1,
    )
    engine.host.most_bytes, notes = asked.host_bytes, []
    while True:
        found = agreed_tiers(engine, asked, run.tiers)
        refused = [why for why in gather_objects(room_refused(engine, found, tokens)) if why]
        if not refused:
            break
        if memory.host_gib != "auto":
            raise ValueError(refused[0])
        notes.append(f"{'':<10}less on the host: {refused[0]}")
        asked = replace(asked, host_bytes=room_of(engine, found, tokens) - 1)
    use_tiers(run, found)
    run.header = (
        *run.header,
        f"memory    {in_words(engine, found)} (memory.profile={memory.profile})",
        *notes,
        *host_lines(engine),
    )


def agreed_tiers(engine: Any, asked: Asked, before: Mapping[str, Any] | None) -> Tiers:
    """Choose tiers that all ranks have room for.

    They are `before`, those of the run that is resumed, where these fit. All take part.
    """
    each = gather_objects(engine.choose_tiers(asked))
    away = [one.host for one in each if one.host != "nothing"]
    chunk = min((one.chunk for one in each if one.chunk), default=0)
    found = Tiers(
        0 if chunk else min(one.kept for one in each),
        min(away, key=HOSTS.index, default="nothing"),
        held=min(one.held for one in each),
        streamed=max(one.streamed for one in each),  # the same bits wherever layers lie
        chunk=chunk,
    )
    recorded = None if before is None else replace(Tiers.of(before), streamed=found.streamed)
    return found if recorded is None or not recorded.no_more_than(found) else recorded


def host_bytes_of(engine: Any, asked: str | float) -> int:
    """Host bytes that a rank may take for activations.

    Equal on all ranks.

    auto: what this host has to spare, shared by its ranks, beside what the base and the embedding
    take there. All take part. Raises ValueError naming memory.host_gib where that is unknown.
    """
    if asked != "auto":
        return int(float(asked) * GIB)
    if engine.embedding.device.type != "cuda":
        return 0
    here = gather_objects(socket.gethostname())
    spare = (spare_bytes() - base_bytes_of(engine)) // here.count(socket.gethostname())
    return min(gather_objects(max(0, spare - engine.movable_bytes)))


def base_bytes_of(engine: Any) -> int:
    """Bytes of the base's file whose pages are locked here.

    They count as available.
    """
    pages = engine.pages
    if pages is None or pages.mapped is None or pages.ranks > 1:  # sharded: on the ranks' cards
        return 0
    return pages.file.manifest.nbytes


def room_of(engine: Any, tiers: Tiers, tokens: int) -> int:
    """Bytes of the host that a pass's large tensors take."""
    layers = len(engine.layers) - tiers.kept
    return room_bytes(engine.layers[0].sizes, tokens, layers, tiers.host)


def room_refused(engine: Any, tiers: Tiers, tokens: int) -> str:
    """Make room on the host; returns why the system refused."""
    try:
        engine.make_room(tiers, tokens)
    except ValueError as error:
        return str(error)
    return ""


def host_lines(engine: Any) -> list[str]:
    """A line on the host memory that this rank locks, if any."""
    if engine.embedding.device.type != "cuda":
        return []
    away = engine.movable_bytes if engine.embedding_away else 0
    ledger = host_ledger(away, engine.host.bytes, base_bytes_of(engine))
    return [f"host      {ledger.describe()}"] if ledger.total_bytes else []


def in_words(engine: Any, tiers: Tiers) -> str:
    sharded = engine.pages is not None and engine.pages.ranks > 1
    return describe(tiers, len(engine.layers), sharded=sharded)


def can_stream(engine: Any) -> bool:
    """Whether layers of the base may lie on the host."""
    return engine.pages is not None and engine.pages.mapped is not None


def place_base(engine: Any, asked: str | int) -> None:
    """Put as many layers on the card as `memory.base` asks.

    auto: all of them.
    """
    if not can_stream(engine):
        return
    one = Base(asked, engine.pages.file.manifest.most_layer_bytes, ranks=engine.pages.ranks)
    streamed = one.streamed(len(engine.layers)) or 0
    if engine.tiers.streamed != streamed:
        engine.use_tiers(replace(engine.tiers, streamed=streamed))


def use_tiers(run: Run, tiers: Tiers) -> None:
    """From here on."""
    run.replica.plain_engine.use_tiers(tiers)
    run.tiers = asdict(tiers)


def smaller_chunk(engine: Any) -> int:
    """The next smaller chunk of places; 0: none is smaller.

    A layer that was kept has no slot on the host yet, and none is made in the middle of a run.
    """
    tiers = engine.tiers
    if tiers.host != "nothing" and not tiers.chunk:
        return 0
    now = tiers.chunk or engine.host.most_tokens
    return next((chunk for chunk in CHUNKS if chunk < now), 0)


def fewer_kept(run: Run, update: int, why: str) -> bool:
    """Need less GPU memory after a lack of it.

    Hold no weights, keep fewer layers, cut smaller chunks, or stream the base.

    Returns False if the least is done, or nothing can be chosen.
    """
    if run.tiers is None:
        return False
    engine = run.replica.plain_engine
    tiers, layers = engine.tiers, len(engine.layers)
    if tiers.held:
        less = replace(tiers, held=0)
    elif tiers.kept > 1:
        less = replace(tiers, kept=max(1, tiers.kept * 3 // 4))
    elif smaller := smaller_chunk(engine):
        less = replace(tiers, kept=0, chunk=smaller)
    elif run.config.memory.base == "auto" and can_stream(engine) and tiers.streamed < layers:
        less = replace(tiers, streamed=layers)
    else:
        return False
    # A layer that was kept has no slot on the host yet.
    goes_there = less.host != "nothing" and less.kept < tiers.kept
    if goes_there and any(gather_objects(room_refused(engine, less, engine.host.most_tokens))):
        return False
    use_tiers(run, less)
    if run.replica.device.type == "cuda":
        torch.cuda.empty_cache()
    run.event(
        update,
        "out_of_memory",
        f"{why}. From here on {in_words(engine, less)}; rows, passes and g stay",
    )
    return True
