"""Tensors of a base, one at a time, from its layers' file.

A 70B in NF4 is merged without ever being whole in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from glassloop.base.layer_file import LayerFile, Shared
from glassloop.base.streamed import state_of
from glassloop.plan.support import groups_of


class Member(NamedTuple):
    """A linear weight's place in the file.

    Layer, group, member of it, and its first weight there.
    """

    layer: int
    group: str
    member: int
    start: int


@dataclass(frozen=True)
class LayerWeights:
    """The base's tensors by name, as weights.Weights gives them.

    Attributes:
        compute: dtype that NF4 weights are dequantised to, which training computed in.
    """

    file: LayerFile
    compute: torch.dtype

    @property
    def folder(self) -> Path:
        return self.file.folder

    @cached_property
    def members(self) -> dict[str, Member]:
        """Quantised weights by name."""
        found = {}
        groups = groups_of(json.loads((self.folder / "config.json").read_text(encoding="utf-8")))
        for index, layer in enumerate(self.file.manifest.layers):
            for group, names in groups.items():
                place, start = layer.groups[group], 0
                for member, name in enumerate(names):
                    key = f"model.layers.{index}.{name}.weight"
                    found[key] = Member(index, group, member, start)
                    start += place.rows[member] * place.columns
        return found

    @cached_property
    def files(self) -> dict[str, Path]:
        """Tensor -> file."""
        names = (*self.members, *self.file.manifest.rest)
        return dict.fromkeys(names, self.folder)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole weight, as a linear layer has it."""
        if name not in self.members:
            return self.file.manifest.rest[name].shape
        one = self.members[name]
        place = self.file.manifest.layers[one.layer].groups[one.group]
        return place.rows[one.member], place.columns

    def get(self, name: str) -> Tensor:
        """Load the weight, NF4 rounded as in training."""
        if name not in self.members:
            return self.file.rest(name).clone()
        from bitsandbytes.functional import dequantize_4bit

        one, (rows, columns) = self.members[name], self.shape(name)
        packed = self.file.packed(one.layer, self.file.layer(one.layer), self.shared)[one.group]
        codes = packed.codes[one.start // 2 : (one.start + rows * columns) // 2].view(-1, 1)
        return dequantize_4bit(codes, state_of(packed, one.member, one.start, self.compute))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    @cached_property
    def shared(self) -> Shared:
        return self.file.shared(torch.device("cpu"))
