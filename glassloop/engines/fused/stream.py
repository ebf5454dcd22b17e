"""Layers' 4-bit weights copied from the host ahead of their use.

A layer's blob lands in one of a few slots while the layers before it compute. All its groups are
dequantised when it begins, and from then on the slot is free for the next copy. So two slots give
nearly two layers of time to each copy. A layer that lies on this card already, as a rank's own part
of a sharded base does, is read there. What is computed is the same, bit for bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from glassloop.base.host_pages import HostPages
from glassloop.base.packed import Packed
from glassloop.base.sharded import fetch
from glassloop.engines.fused.layer import Layer
from glassloop.engines.fused.linear import Scratch
from glassloop.predict.tiers import SLOTS

HERE = -1  # in place of a slot, for a layer that lies on this card


class LayerStream:
    """Copies of layers, in the order in which a pass visits them."""

    def __init__(self, pages: HostPages, device: torch.device):
        self.pages, self.device = pages, device
        self.copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.slots: list[Tensor] = []  # (bytes,) uint8 each
        self.views: dict[tuple[int, int], dict[str, Packed]] = {}  # by layer and slot, or HERE
        self.vacant: deque[tuple[int, torch.Event | None]] = deque()  # slot, its last reader
        self.here: deque[tuple[int, int, torch.Event | None]] = deque()  # layer, slot, its arrival
        self.coming: deque[int] = deque()

    def open(self, slots: int = SLOTS) -> None:
        """Make room for `slots` layers on the device; 0 gives it back."""
        self.views.clear()
        self.here.clear()
        self.coming.clear()
        if len(self.slots) != slots:
            if self.copying is not None:  # a copy on its way would land in what takes their place
                torch.cuda.current_stream(self.device).wait_stream(self.copying)
            size = self.pages.file.manifest.most_layer_bytes
            self.slots = [
                torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(slots)
            ]
        self.vacant = deque((slot, self._now()) for slot in range(slots))

    def begin(self, order: Sequence[int], then: Sequence[int]) -> None:
        """Start copies for a pass over `order`, and then over `then`.

        What is on its way already is kept if it is what `order` begins with.
        """
        due = [[layer for layer in one if not self._lies_here(layer)] for one in (order, then)]
        coming = deque([*due[0], *due[1][: len(self.slots)]])
        if [layer for layer, *_ in self.here] != list(coming)[: len(self.here)]:
            self.vacant.extend((slot, arrival) for _, slot, arrival in self.here)
            self.here.clear()
        for _ in self.here:
            coming.popleft()
        self.coming = coming
        self._fetch()

    def fill(self, index: int, layer: Layer, scratch: Scratch) -> None:
        """Dequantise a layer's groups from its slot, and free the slot."""
        if all(scratch.holds_of(linear) for linear in layer.linears):
            return  # the pass turns at this layer
        if self._lies_here(index):
            self._dequantise(layer, self._views(index, HERE), scratch)
            return
        found, slot, arrival = self.here.popleft()
        assert found == index, f"layer {index} is due, {found} has come"
        if arrival is not None:
            torch.cuda.current_stream(self.device).wait_event(arrival)
        try:
            self._dequantise(layer, self._views(index, slot), scratch)
        finally:  # a pass that finds no memory here would take the slot with it
            self.vacant.append((slot, self._now()))
        self._fetch()

    def _dequantise(self, layer: Layer, views: dict[str, Packed], scratch: Scratch) -> None:
        for linear in layer.linears:
            home, linear.packed = linear.packed, views[linear.group]
            try:
                scratch.weights(linear)
            finally:
                linear.packed = home

    def _fetch(self) -> None:
        """Copy layers that are due to slots that are free."""
        while self.coming and self.vacant:
            index, (slot, reader) = self.coming.popleft(), self.vacant.popleft()
            blob = self.pages.blob(index)
            if self.copying is None:
                self._copy(blob, slot)
                self.here.append((index, slot, None))
                continue
            if reader is not None:
                self.copying.wait_event(reader)
            with torch.cuda.stream(self.copying):
                self._copy(blob, slot)
            self.here.append((index, slot, self.copying.record_event()))

    def _copy(self, blob: Tensor, slot: int) -> None:
        into = self.slots[slot][: len(blob)]
        if blob.is_cuda and blob.device != into.device:
            fetch(into, blob)
        else:
            into.copy_(blob, non_blocking=True)

    def _views(self, index: int, slot: int) -> dict[str, Packed]:
        key = index, slot
        if key not in self.views:
            blob = self.pages.blob(index) if slot == HERE else self.slots[slot]
            self.views[key] = self.pages.file.packed(index, blob, self.pages.shared)
        return self.views[key]

    def _lies_here(self, index: int) -> bool:
        return index in self.pages.own and index in self.pages.peers

    def _now(self) -> torch.Event | None:
        """An event behind all that the computing stream was given so far."""
        if self.copying is None:
            return None
        return torch.cuda.current_stream(self.device).record_event()
