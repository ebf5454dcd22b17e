"""Pinned host memory for large tensors of a pass.

They are tensors of layers, and an embedding of which a pass reads a few rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

IN_FLIGHT = 2


class _Visible:
    """Pinned host memory, shown to a GPU as its own."""

    def __init__(self, pinned: Tensor):
        self.pinned = pinned  # lives as long as what is made of it
        self.__cuda_array_interface__ = {
            "shape": tuple(pinned.shape),
            "typestr": f"<i{pinned.element_size()}",
            "data": (pinned.data_ptr(), False),
            "version": 3,
        }


def on_host(weight: Tensor) -> Tensor:
    """Move a tensor's bytes to pinned host memory.

    It stays a tensor of its device, for one that is read a few rows at a time.
    """
    if not weight.is_cuda:
        return weight
    return torch.as_tensor(_Visible(weight.cpu().pin_memory()), device=weight.device).view(
        weight.dtype
    )


class HostRoom:
    """Pinned buffers for layers' tensors, on their way in or out.

    A tensor that is on its way is referred to until the computing stream has waited for its copy:
    then whatever takes its place in memory comes later in that stream. So at most IN_FLIGHT layers
    are on their way out, however far the host runs ahead.
    """

    def __init__(self, layers: int, device: torch.device):
        self.layers, self.device = layers, device
        # Of any pass, if it is known: room is made once then, which takes a second for a gigabyte.
        self.most_tokens = 0
        self.rooms: list[Tensor] = []  # (layers, T, width) each
        self.lengths: dict[int, list[int]] = {}
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.going: deque[tuple[Sequence[Tensor], torch.Event]] = deque()
        self.coming: dict[int, tuple[list[Tensor], torch.Event | None]] = {}

    def begin(self, tokens: int, widths: Sequence[int], dtype: torch.dtype) -> None:
        """Make room for the layers' tensors of a pass.

        Each has at most `tokens` rows of its width.
        """
        if not self.rooms or self.rooms[0].shape[1] < tokens:
            self.rooms.clear()  # freed first
            shapes = [(self.layers, max(tokens, self.most_tokens), width) for width in widths]
            self.rooms = [
                torch.empty(shape, dtype=dtype, pin_memory=self.stream is not None)
                for shape in shapes
            ]
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
        places = [
            room[index, :length]
            for room, length in zip(self.rooms, self.lengths[index], strict=True)
        ]
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
        for room, one in zip(self.rooms, tensors, strict=True):
            room[index, : len(one)].copy_(one, non_blocking=True)

    def _settle(self, most: int) -> None:
        """Wait until at most so many layers are on their way out.

        The computing stream waits, not the host.
        """
        while len(self.going) > most:
            torch.cuda.current_stream(self.device).wait_event(self.going.popleft()[1])
