"""Host memory for large tensors of a pass.

They are tensors of layers, and an embedding of which a pass reads a few rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from glassloop.base.host_pages import Seen
from glassloop.engines.fused.pinned import pinned

IN_FLIGHT = 2


def on_host(weight: Tensor) -> Tensor:
    """Move a tensor's bytes to page-locked host memory.

    It stays a tensor of its device, for one that is read a few rows at a time.
    """
    if not weight.is_cuda:
        return weight
    flat = weight.contiguous().flatten().view(torch.uint8)
    (memory,) = pinned(1, flat.nbytes, device=weight.device)
    memory.copy_(flat)
    seen = torch.as_tensor(Seen(memory), device=weight.device)
    return seen.view(weight.dtype).view(weight.shape)


class HostRoom:
    """Host memory for layers' tensors on their way in or out.

    A tensor that is on its way is referred to until the computing stream has waited for its copy:
    then whatever takes its place in memory comes later in that stream. So at most IN_FLIGHT layers
    are on their way out, however far the host runs ahead.
    """

    def __init__(self, device: torch.device):
        self.device = device
        # Of any pass, if it is known: room is made once then.
        self.most_tokens = 0
        self.most_bytes: int | None = None  # that may be taken; None: as many as are needed
        self.slots: list[Tensor] = []  # (bytes,) uint8, a layer's each
        self.widths: Sequence[int] = ()
        self.dtype = torch.float32
        self.lengths: dict[int, list[int]] = {}
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.going: deque[tuple[Sequence[Tensor], torch.Event]] = deque()
        self.coming: dict[int, tuple[list[Tensor], torch.Event | None]] = {}

    @property
    def bytes(self) -> int:
        """Bytes that the layers' tensors may lie in."""
        return sum(slot.nbytes for slot in self.slots)

    def open(self, layers: int, slot_bytes: int) -> None:
        """Make room for `layers` layers of equal size.

        0 layers give it back.

        Raises ValueError naming memory.host_gib where the system does not lock so much.
        """
        if layers and len(self.slots) >= layers and self.slots[0].nbytes >= slot_bytes:
            return
        if self.stream is not None:
            self.stream.synchronize()  # copies may still be on their way
        self.going.clear()
        self.coming.clear()
        self.slots = []  # freed first
        if self.stream is None:
            self.slots = [torch.empty(slot_bytes, dtype=torch.uint8) for _ in range(layers)]
        else:
            self.slots = pinned(layers, slot_bytes, self.most_bytes, self.device)

    def begin(self, layers: int, tokens: int, widths: Sequence[int], dtype: torch.dtype) -> None:
        """Make ready for the first `layers` layers' tensors of a pass.

        Each has at most `tokens` rows of its width.
        """
        most = max(tokens, self.most_tokens)
        self.open(layers, most * sum(widths) * dtype.itemsize)
        self.widths, self.dtype = widths, dtype
        if self.stream is not None and (self.going or self.coming):
            # A pass ended early: copies still read and write what is given up here.
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self.going.clear()
        self.coming.clear()

    def put(self, index: int, tensors: Sequence[Tensor]) -> None:
        """Copy a layer's tensors away."""
        self.lengths[index] = [len(one) for one in tensors]
        if self.stream is None:
            self._copy_out(index, tensors)
            return
        self._settle(IN_FLIGHT - 1)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self._copy_out(index, tensors)
        self.going.append((tensors, self.stream.record_event()))

    def fetch(self, index: int) -> None:
        """Begin to bring a layer's tensors back."""
        if index in self.coming:
            return
        self._settle(0)
        places = self._places(index)
        tensors = [
            torch.empty(place.shape, dtype=place.dtype, device=self.device) for place in places
        ]
        if self.stream is not None:
            self.stream.wait_stream(
                torch.cuda.current_stream(self.device)
            )  # what was in that memory may still be read
        with torch.cuda.stream(self.stream):
            for one, place in zip(tensors, places, strict=True):
                one.copy_(place, non_blocking=True)
        self.coming[index] = (
            tensors,
            self.stream.record_event() if self.stream is not None else None,
        )

    def take(self, index: int) -> list[Tensor]:
        """A layer's tensors, when they have come."""
        self.fetch(index)
        tensors, event = self.coming.pop(index)
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
        return tensors

    def _copy_out(self, index: int, tensors: Sequence[Tensor]) -> None:
        for place, one in zip(self._places(index), tensors, strict=True):
            place.copy_(one, non_blocking=True)

    def _places(self, index: int) -> list[Tensor]:
        """(length, width) each: where a layer's tensors lie in its slot."""
        found, start = [], 0
        for length, width in zip(self.lengths[index], self.widths, strict=True):
            end = start + length * width * self.dtype.itemsize
            found.append(self.slots[index][start:end].view(self.dtype).view(length, width))
            start = end
        return found

    def _settle(self, most: int) -> None:
        """Wait until at most `most` layers are on their way out.

        The computing stream waits, not the host.
        """
        while len(self.going) > most:
            torch.cuda.current_stream(self.device).wait_event(self.going.popleft()[1])
