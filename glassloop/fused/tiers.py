"""What memory is spent on, in the order of what it gains: activations kept for backward, then weights held in 16 bits.

A layer's activations wait for backward on the GPU whole; or they are computed again from its input; and that input may wait on the host. Every
choice gives the same bits; they differ in memory and time. Keeping a layer costs some 95 kB a token of an 8B model and saves nearly all of
its forward products; holding its weights costs 0.4 GiB and saves two dequantisations a pass.
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
        host: the inputs of the others, and the embedding, lie in pinned host memory.
        held: how many layers, from the first up, hold their weights in 16 bits beside the 4-bit ones.
    """

    kept: int
    host: bool
    held: int = 0

    def describe(self, layers: int) -> str:
        """For people: "12 of 32 layers kept, 20 recomputed from inputs on the GPU"."""
        others = layers - self.kept
        where = "the host" if self.host else "the GPU"
        told = [f"{self.kept} of {layers} layers kept"]
        told += [f"{others} recomputed from inputs on {where}"] if others else []
        return ", ".join(told + ([f"weights of {self.held} held in 16 bits"] if self.held else []))


def kept_bytes(layer: Layer, tokens: int) -> int:
    """Of a layer that keeps all that backward needs."""
    element = layer.qkv.a.element_size()
    columns = 3 * layer.qkv.columns + layer.qkv.rows + layer.gate_up.rows + 2 * layer.gate_up.rank + layer.qkv.rank
    return tokens * (element * (columns + layer.o.rank + layer.down.rank) + 4 * layer.heads)


def input_bytes(layer: Layer, tokens: int) -> int:
    """Of a layer that keeps its input alone."""
    return tokens * layer.qkv.a.element_size() * (layer.qkv.columns + layer.down.rank)


def held_bytes(layer: Layer) -> int:
    """Of a layer's weights in 16 bits, adapters beside them."""
    return sum((one.rows + one.rank) * (one.columns + one.rank) * one.a.element_size() for one in layer.linears)


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
    fits_host = host_bytes >= count * input_bytes(layer, tokens)
    if profile == "min":
        return Tiers(0, fits_host)
    budget = used + free if profile == "fill" else min(used + free, int(float(profile) * GIB))
    room = budget * (1 - FRAGMENTS) - used - SPARE_BYTES
    inputs = count * input_bytes(layer, tokens)
    most = room - inputs - max(live_bytes(layer, tokens), head_bytes)
    more = kept_bytes(layer, tokens) - input_bytes(layer, tokens)
    if most >= count * more:
        return Tiers(count, False, held=min(count, int((most - count * more) // held_bytes(layer))))
    kept = int((most - more) // more)  # one is being computed again while the others wait
    return Tiers(kept, False) if kept >= 0 else Tiers(0, fits_host)


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
