"""What of a pass waits in pinned host memory: layers' inputs, and an embedding of which a pass reads a few rows."""

from __future__ import annotations

import torch
from torch import Tensor


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
    """The same values as a tensor of the same device whose bytes lie in pinned host memory: for one that is read a few rows at a time."""
    if not weight.is_cuda:
        return weight
    return torch.as_tensor(_Visible(weight.cpu().pin_memory()), device=weight.device).view(weight.dtype)


class HostInputs:
    """Inputs of layers, in pinned memory; copies run beside the computation."""

    def __init__(self, layers: int, device: torch.device):
        self.layers, self.device = layers, device
        self.most_tokens = 0  # of any pass, where it is known: room is made once then, which takes a second for a gigabyte
        self.room: Tensor | None = None  # (layers, T, H)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.coming: dict[int, Tensor] = {}

    def begin(self, tokens: int, hidden: int, dtype: torch.dtype) -> None:
        """Make room for a pass."""
        if self.room is None or self.room.shape[1] < tokens:
            self.room = None  # freed first
            self.room = torch.empty(self.layers, max(tokens, self.most_tokens), hidden, dtype=dtype, pin_memory=self.stream is not None)
        self.coming.clear()

    def put(self, index: int, x: Tensor) -> None:
        """Copy a layer's input (T, H) away; its GPU memory is free once that is done."""
        assert self.room is not None
        place = self.room[index, : len(x)]
        if self.stream is None:
            place.copy_(x)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            place.copy_(x, non_blocking=True)
        x.record_stream(self.stream)

    def fetch(self, index: int, tokens: int) -> None:
        """Begin to bring a layer's input back."""
        assert self.room is not None
        if index in self.coming:
            return
        place = self.room[index, :tokens]
        x = torch.empty(place.shape, dtype=place.dtype, device=self.device)
        self.coming[index] = x
        if self.stream is None:
            x.copy_(place)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # its memory may still be read by what was there before
        with torch.cuda.stream(self.stream):
            x.copy_(place, non_blocking=True)
        x.record_stream(self.stream)

    def take(self, index: int, tokens: int) -> Tensor:
        """A layer's input (T, H), when it has come."""
        self.fetch(index, tokens)
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return self.coming.pop(index)
