"""Where a pass's activations wait for backward: on the GPU whole, computed again from each layer's input, or that input on the host.

Every choice gives the same gradient; they differ in memory and time. Keeping a layer costs some 95 kB a token of an 8B model and saves two
thirds of its forward products, so memory is best spent on as many whole layers as fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glassloop.fused.layer import Layer

GIB = 2**30
FRAGMENTS = 0.03  # of the memory in use that an allocator cannot hand out
SPARE_BYTES = 512 * 2**20  # for what is not counted: libraries' workspaces, evaluation


@dataclass(frozen=True)
class Tiers:
    """What is done with each layer of the heaviest pass.

    Attributes:
        kept: how many layers, from the last one down, keep all that backward needs.
        host: the inputs of the others wait in pinned host memory.
    """

    kept: int
    host: bool

    def describe(self, layers: int) -> str:
        """For people: "12 of 32 layers kept, 20 recomputed from inputs on the GPU"."""
        others = layers - self.kept
        where = "the host" if self.host else "the GPU"
        return f"{self.kept} of {layers} layers kept" + (f", {others} recomputed from inputs on {where}" if others else "")


def kept_bytes(layer: Layer, tokens: int) -> int:
    """Of a layer that keeps all that backward needs."""
    element = layer.qkv.a.element_size()
    columns = 3 * layer.qkv.columns + layer.qkv.rows + layer.gate_up.rows + 2 * layer.gate_up.rank + layer.qkv.rank
    return tokens * (element * (columns + layer.o.rank + layer.down.rank) + 4 * layer.heads)


def input_bytes(layer: Layer, tokens: int) -> int:
    """Of a layer that keeps its input alone."""
    return tokens * layer.qkv.a.element_size() * (layer.qkv.columns + layer.down.rank)


def live_bytes(layer: Layer, tokens: int) -> int:
    """At most at one time within a layer's backward, beyond what the layer keeps: the MLP's gradient, or attention's."""
    element, hidden = layer.qkv.a.element_size(), layer.qkv.columns
    mlp = layer.down.columns + 4 * hidden
    attention = 6 * hidden + 2 * layer.qkv.rows + 2 * hidden  # its kernel adds gradients of q up in fp32
    return tokens * element * max(mlp, attention)


def choose(
    profile: str | float, layers: list[Layer], *, tokens: int, used: int, free: int, head_bytes: int, host_bytes: int
) -> Tiers:
    """The tiers of a profile.

    Args:
        profile: min: as little as possible. fill: as much as there is. A number: GiB of the GPU that may be used in all.
        tokens: slot tokens of the heaviest pass.
        used, free: bytes of the GPU that are taken now and that could be taken yet.
        head_bytes: what the head's loss takes while no layer computes.
        host_bytes: pinned memory that may be taken.

    Returns:
        The tiers; where not even the smallest fit the budget, the smallest, and it is for the preflight to say so.
    """
    layer, count = layers[0], len(layers)
    on_host = host_bytes >= count * input_bytes(layer, tokens)
    if profile == "min":
        return Tiers(0, on_host)
    budget = used + free if profile == "fill" else min(used + free, int(float(profile) * GIB))
    room = budget * (1 - FRAGMENTS) - used - SPARE_BYTES
    inputs = count * input_bytes(layer, tokens)
    most = room - inputs - max(live_bytes(layer, tokens), head_bytes)
    more = kept_bytes(layer, tokens) - input_bytes(layer, tokens)
    if most >= count * more:
        return Tiers(count, False)
    kept = int((most - more) // more)  # one is being computed again while the others wait
    return Tiers(kept, False) if kept >= 0 else Tiers(0, on_host)


class HostInputs:
    """Inputs of layers, in pinned memory; copies run beside the computation."""

    def __init__(self, layers: int, device: torch.device):
        self.layers, self.device = layers, device
        self.room: Tensor | None = None  # (layers, T, H)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.coming: dict[int, Tensor] = {}

    def begin(self, tokens: int, hidden: int, dtype: torch.dtype) -> None:
        """Make room for a pass."""
        if self.room is None or self.room.shape[1] < tokens:
            self.room = None  # freed first
            self.room = torch.empty(self.layers, tokens, hidden, dtype=dtype, pin_memory=self.stream is not None)
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
