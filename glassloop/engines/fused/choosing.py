"""Tiers of an engine, by what its device has free."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from glassloop.engines.fused.parts import largest
from glassloop.predict.choice import Asked, Base, Room, choose
from glassloop.predict.tiers import Tiers, head_bytes, scratch_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from glassloop.base.host_pages import HostPages
    from glassloop.engines.fused.linear import Scratch


class Placed(Protocol):
    """The parts of a FusedEngine that lie on a device, or may."""

    embedding: Tensor
    head: Tensor
    layers: Any
    pages: HostPages | None
    scratch: Scratch
    tiers: Tiers
    embedding_away: bool

    @property
    def movable_bytes(self) -> int: ...


def tiers_for(engine: Placed, asked: Asked) -> Tiers:
    """Choose tiers by what is free. On a CPU everything is kept."""
    device, count = engine.embedding.device, len(engine.layers)
    weights = None
    if engine.pages is not None and engine.pages.mapped is not None:
        size = engine.pages.file.manifest.most_layer_bytes
        weights = Base(asked.base, size, ranks=engine.pages.ranks)
    if device.type != "cuda":
        streamed = 0 if weights is None else weights.streamed(count) or 0
        return Tiers(1 if asked.profile == "min" else count, streamed=streamed)
    free = torch.cuda.mem_get_info(device)[0] // asked.sharing
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    sizes = largest(engine.layers)
    fixed = scratch_bytes(sizes) - engine.scratch.bytes
    if weights is not None:  # counted apart from what is used
        fixed -= weights.bytes(count, engine.tiers.streamed)
    vocabulary, hidden = engine.head.shape
    places, element = asked.supervised_tokens, engine.head.element_size()
    room = Room(
        used=torch.cuda.memory_allocated(device) + fixed,
        free=free - fixed,
        head=head_bytes(vocabulary, hidden, places, element),
        embedding=0 if engine.embedding_away else engine.movable_bytes,
        base=weights,
    )
    return choose(asked, room, sizes, count)
