"""Choice of memory tiers for a budget, from shapes alone.

Legend: see tiers.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from glassloop.predict.chunks import (
    CHUNKS,
    backward_bytes,
    before_last_bytes,
    exchange_bytes,
    forward_bytes,
)
from glassloop.predict.tiers import (
    AWAY,
    FRAGMENTATION,
    GIB,
    HOSTS,
    SLOTS,
    SPARE_BYTES,
    Host,
    Sizes,
    Tiers,
    away_bytes,
    beside_away_bytes,
    gradient_bytes,
    held_bytes,
    index_bytes,
    input_bytes,
    kept_bytes,
    live_bytes,
    room_bytes,
    turn_bytes,
)

LONG_ROW = 8192  # tokens, from which attention is a large part of a layer's time
How = tuple[Host, int]  # what waits on the host; places of a chunk, 0: all


@dataclass(frozen=True)
class Base:
    """The 4-bit weights that can stream from the host.

    Attributes:
        asked: memory.base: auto, gpu, host, sharded, a number of layers on the GPU, or GiB as
            "12GiB".
        layer_bytes: of one layer's weights. slots: room on the GPU for layers on their way.
        ranks: that keep a part each, if they are sharded.
    """

    asked: str | int
    layer_bytes: int
    slots: int = SLOTS
    ranks: int = 1

    def streamed(self, layers: int) -> int | None:
        """Number of layers that stream as asked; None: as few as needed."""
        if self.asked in ("gpu", "host", "sharded"):
            return 0 if self.asked == "gpu" else layers
        if isinstance(self.asked, int):
            return max(0, layers - self.asked)
        if self.asked.endswith("GiB"):
            budget = int(float(self.asked.removesuffix("GiB")) * GIB)
            return max(0, layers - budget // self.layer_bytes)
        return None

    def bytes(self, layers: int, streamed: int) -> int:
        """On the GPU, slots included."""
        own = -(-layers // self.ranks) if self.asked == "sharded" else 0
        return (own + layers - streamed + min(self.slots, streamed)) * self.layer_bytes


@dataclass(frozen=True)
class Asked:
    """What tiers are chosen for.

    Attributes:
        profile: memory.profile. min: as little as possible. fill: as much as there is. A number:
            GiB of the GPU that may be used in all.
        tokens, supervised_tokens: slot tokens of the heaviest pass, and those with a label.
        host_bytes: of the host, that may be taken for layers' large tensors.
        base: memory.base.
        sharing: ranks on one GPU: each takes its part of what is free.
        longest: tokens of the longest row; 0: not known.
        split: ranks that share the pass; tokens are one's.
    """

    profile: str | float
    tokens: int
    supervised_tokens: int
    host_bytes: int
    base: str | int = "auto"
    sharing: int = 1
    longest: int = 0
    split: int = 1


@dataclass(frozen=True)
class Room:
    """Bytes of a GPU that decide tiers.

    Attributes:
        used, free: what is taken and what could be taken yet; without any of the 4-bit weights
            where `base` is given.
        head: what the head's loss takes while no layer computes.
        embedding: what goes to the host as soon as anything does.
        base: 4-bit weights that may stream; None: they are part of `used`.
    """

    used: int
    free: int
    head: int = 0
    embedding: int = 0
    base: Base | None = None


@dataclass(frozen=True)
class _Pass:
    """A pass of the layers under choice, and what it may take."""

    asked: Asked
    room: Room
    one: Sizes
    layers: int

    @property
    def most(self) -> float:
        """Bytes of the GPU for a pass and its streamed base."""
        room, profile = self.room, self.asked.profile
        all_in_all = room.used + room.free
        budget = all_in_all if profile in ("min", "fill") else int(float(profile) * GIB)
        return min(budget, all_in_all) * (1 - FRAGMENTATION) - room.used - SPARE_BYTES

    @property
    def beyond(self) -> int:
        """Bytes beyond what layers keep, with all places at once.

        A long pass has a larger gradient than the spare bytes cover.
        """
        one, tokens = self.one, self.asked.tokens
        extra = max(0, gradient_bytes(one, tokens) - SPARE_BYTES)
        extra += index_bytes(tokens) + turn_bytes(one, tokens)
        live = live_bytes(one, tokens) + exchange_bytes(one, tokens, self.asked.split)
        return max(live, self.room.head) + extra

    def needed(self, how: How) -> int:
        """Bytes of the GPU while one layer is at work."""
        (host, chunk), one, tokens, layers = how, self.one, self.asked.tokens, self.layers
        stays, away = input_bytes(one, tokens), away_bytes(one, tokens, host)
        if host != "nothing":
            stays = beside_away_bytes(one, tokens, host)
        gone = 0 if host == "nothing" else self.room.embedding
        if not chunk:  # one layer is kept or computed again: its memory is the same
            # What it left on the host has come back, and that of the next is on its way.
            return kept_bytes(one, tokens) + away + (layers - 1) * stays + self.beyond - gone
        work = one, tokens, chunk, host
        ranks = self.asked.split
        backward = backward_bytes(*work, ranks) + gradient_bytes(one, tokens)
        backward += turn_bytes(one, tokens)
        forward = forward_bytes(*work, self.asked.supervised_tokens, ranks)
        forward = max(forward, before_last_bytes(*work, stays, ranks))
        busiest = max(backward, forward, self.room.head)
        return layers * stays + 2 * away + busiest + index_bytes(tokens) - gone

    def allowed(self, how: How) -> bool:
        """True if the host has room and chunks divide the pass."""
        host, chunk = how
        layers = self.layers if chunk else self.layers - 1
        room = room_bytes(self.one, self.asked.tokens, layers, host)
        return chunk < self.asked.tokens and room <= self.asked.host_bytes

    def streamed(self, needed: float) -> int:
        """The fewest streamed layers that leave this room, or those asked."""
        base = self.room.base
        if base is None:
            return 0
        wanted = base.streamed(self.layers)
        counts = range(self.layers)
        fewest = (s for s in counts if self.most - base.bytes(self.layers, s) >= needed)
        return next(fewest, self.layers) if wanted is None else wanted

    def fits(self, how: How) -> bool:
        needed = self.needed(how)
        return self.left(self.streamed(needed)) >= needed

    def left(self, streamed: int) -> float:
        """Bytes beside the 4-bit weights."""
        base = self.room.base
        return self.most - (0 if base is None else base.bytes(self.layers, streamed))

    def tiers(self, how: How) -> Tiers:
        host, chunk = how
        needed = self.needed(how)
        streamed = self.streamed(needed)
        kept = 0 if chunk else min(1 + self.more_kept(host, needed, streamed), self.layers)
        return Tiers(kept, host, streamed=streamed, chunk=chunk)

    def more_kept(self, host: Host, needed: float, streamed: int) -> int:
        """Count layers that can be kept whole beside the last one."""
        if host == "nothing" or self.asked.profile == "min":
            return 0
        one, tokens = self.one, self.asked.tokens
        # Two layers are on their way to the host while all of these are there.
        spare = self.left(streamed) - needed - away_bytes(one, tokens, host)
        each = kept_bytes(one, tokens) - beside_away_bytes(one, tokens, host)
        return max(0, int(spare // each))


def choose(asked: Asked, room: Room, one: Sizes, layers: int) -> Tiers:
    """Tiers for a pass, the smallest if none fits the budget.

    `one`, `layers`: a layer, and how many there are.
    """
    at = _Pass(asked, room, one, layers)
    whole: list[How] = [(host, 0) for host in HOSTS]
    streamed = at.streamed(min(at.needed(how) for how in whole if at.allowed(how)))
    inputs, more = input_bytes(one, asked.tokens), kept_bytes(one, asked.tokens)
    more -= inputs
    spare = at.left(streamed) - at.beyond - layers * inputs
    kept = 0 if asked.profile == "min" else int(spare // more)
    if kept >= layers:
        held = min(layers, int((spare - layers * more) // held_bytes(one)))
        return Tiers(layers, held=0 if streamed else held, streamed=streamed)
    # From the quickest on: what is computed again costs more than what is copied or cut in chunks.
    hosts: list[Host] = [*reversed(AWAY), "nothing"]
    ways: list[How] = [(host, size) for host in hosts for size in (0, *CHUNKS)]
    options = [how for how in ways if at.allowed(how)]
    if kept >= 1:
        # Few layers kept spare less than attention costs that is computed again in all others.
        spares = asked.longest >= LONG_ROW and 2 * kept < layers
        options = [how for how in options if spares and how[0] in ("attention", "all")]
    fitting = [how for how in options if at.fits(how)]
    if fitting:
        return at.tiers(fitting[0])
    if kept >= 1:  # their memory is free when the first of the others is computed again
        return Tiers(kept, streamed=streamed)
    return at.tiers(min(options, key=at.needed))


WORDS = {
    "nothing": "inputs",
    "inputs": "inputs alone",
    "attention": "inputs and attention's output",
    "all": "inputs, attention's output and middle",
}


def describe(tiers: Tiers, layers: int, *, sharded: bool = False) -> str:
    """Tiers in words.

    Such as "12 of 32 layers kept, inputs of the others on the GPU".

    `sharded`: layers stream from the ranks' cards.
    """
    told = [f"{tiers.kept} of {layers} layers kept"]
    where = "GPU" if tiers.host == "nothing" else "host"
    if tiers.kept < layers:
        told.append(f"{WORDS[tiers.host]} of the others on the {where}")
    if tiers.chunk:
        told.append(f"products over {tiers.chunk:,} tokens at a time")
    if tiers.streamed:
        source = "the ranks' cards" if sharded else "the host"
        told.append(f"4-bit weights of {tiers.streamed} streamed from {source}")
    if tiers.held:
        told.append(f"weights of {tiers.held} held in 16 bits")
    return ", ".join(told)
