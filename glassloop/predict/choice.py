"""Choice of memory tiers for a budget, from shapes alone.

Legend: see tiers.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from glassloop.predict.tiers import (
    AWAY,
    FRAGMENTATION,
    GIB,
    SLOTS,
    SPARE_BYTES,
    Host,
    Sizes,
    Tiers,
    away_bytes,
    beside_away_bytes,
    gradient_bytes,
    held_bytes,
    input_bytes,
    kept_bytes,
    live_bytes,
    room_bytes,
)


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
    """

    profile: str | float
    tokens: int
    supervised_tokens: int
    host_bytes: int
    base: str | int = "auto"
    sharing: int = 1


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


def choose(asked: Asked, room: Room, one: Sizes, layers: int) -> Tiers:
    """Tiers for a pass, the smallest if none fits the budget.

    `one`, `layers`: a layer, and how many there are.
    """
    profile, tokens, base = asked.profile, asked.tokens, room.base
    inputs = layers * input_bytes(one, tokens)
    budget = room.used + room.free if profile in ("min", "fill") else int(float(profile) * GIB)
    most = min(budget, room.used + room.free) * (1 - FRAGMENTATION) - room.used - SPARE_BYTES
    most -= max(live_bytes(one, tokens), room.head)  # beyond what layers keep
    # A long pass has more beside than the spare bytes cover.
    most -= max(0, gradient_bytes(one, tokens, asked.supervised_tokens) - SPARE_BYTES)
    kept_one = kept_bytes(one, tokens)
    more = kept_one - input_bytes(one, tokens)
    # One layer is kept or computed again: its memory is the same. What it left on the host has come
    # back, and that of the next is on its way.
    least: dict[Host, int] = {
        host: kept_one + away_bytes(one, tokens, host) - room.embedding for host in AWAY
    }
    for host in AWAY:
        least[host] += (layers - 1) * beside_away_bytes(one, tokens, host)
    hosts: list[Host] = [
        host
        for host in reversed(AWAY)
        if asked.host_bytes >= room_bytes(one, tokens, layers - 1, host)
    ]
    streamed = 0
    if base is not None:
        wanted = base.streamed(layers)
        smallest = min([more + inputs, *(least[host] for host in hosts)])
        fewest = (s for s in range(layers) if most - base.bytes(layers, s) >= smallest)
        streamed = next(fewest, layers) if wanted is None else wanted
        most -= base.bytes(layers, streamed)
    kept = 0 if profile == "min" else int((most - inputs) // more)
    if kept >= layers:
        held = min(layers, int((most - inputs - layers * more) // held_bytes(one)))
        return Tiers(layers, held=0 if streamed else held, streamed=streamed)
    if kept >= 1:  # their memory is free when the first of the others is computed again
        return Tiers(kept, streamed=streamed)
    # What is computed again costs more than what is copied: the most that fits, else the least.
    fitting: list[Host] = [host for host in hosts if least[host] <= most]
    best: Host = fitting[0] if fitting else hosts[-1] if hosts else "nothing"
    return Tiers(min(1, layers), best, streamed=streamed)


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
    if tiers.streamed:
        source = "the ranks' cards" if sharded else "the host"
        told.append(f"4-bit weights of {tiers.streamed} streamed from {source}")
    if tiers.held:
        told.append(f"weights of {tiers.held} held in 16 bits")
    return ", ".join(told)
