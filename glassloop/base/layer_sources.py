"""Sources of a file of layers, read a layer at a time.

Safetensors, or drawn weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from glassloop.base.layer_file import (
    BLOCK,
    NotStreamable,
    Quantised,
)
from glassloop.base.random import drawn_shapes, weights_of
from glassloop.base.source import BaseError, BaseSource, files_of

Groups = Mapping[str, Sequence[str]]


class WeightFiles:
    """A folder of safetensors, read one layer at a time.

    Its weights are unquantised, or in bitsandbytes' NF4.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.is_file():
            self.files = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        elif single.is_file():
            with safe_open(single, framework="pt") as opened:
                self.files = dict.fromkeys(opened.keys(), single.name)
        else:
            raise NotStreamable(f"{folder} has no model.safetensors")
        for name in set(self.files.values()):
            if Path(name).name != name:
                raise BaseError(
                    f"model.id = {folder}: its index names {name!r}, outside the folder"
                )
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "text_config" in config:
            raise NotStreamable(f"{folder} has parts for images or sound beside its decoder")
        self.count = int(config["num_hidden_layers"])
        if not any(name.startswith("model.layers.0.self_attn.") for name in self.files):
            raise NotStreamable(f"{folder} names its weights otherwise than the model does")
        self.opened: tuple[str, Any] = "", None

    def get(self, name: str) -> Tensor:
        if name not in self.files:
            raise BaseError(
                f"model.id = {self.folder}: {name} is missing from its files: "
                "take a complete repository"
            )
        if self.opened[0] != self.files[name]:
            path = self.folder / self.files[name]
            self.opened = self.files[name], safe_open(path, framework="pt").__enter__()
        return self.opened[1].get_tensor(name)

    def layers(self, groups: Groups) -> Iterator[dict[str, Tensor | Quantised]]:
        for index in range(self.count):
            own = f"model.layers.{index}."
            yield {
                name: self.weight(f"{own}{name}.weight")
                for names in groups.values()
                for name in names
            }

    def weight(self, name: str) -> Tensor | Quantised:
        import bitsandbytes.functional as bnb

        prefix = f"{name}."
        state = {key: self.get(key) for key in self.files if key.startswith(prefix)}
        if not state:
            return self.get(name)
        stripped = {key.removeprefix(prefix): value for key, value in state.items()}
        found = bnb.QuantState.from_dict(stripped, device=torch.device("cpu"))
        return Quantised(self.get(name), found)

    def rest(self, groups: Groups) -> Iterator[tuple[str, Tensor]]:
        linear = tuple(f".{name}.weight" for names in groups.values() for name in names)
        for name in self.files:
            if not any(part in name for part in linear):
                yield name, self.get(name)

    def nbytes(self, groups: Groups) -> int:
        """More than the file of layers will have."""
        return sum((self.folder / name).stat().st_size for name in set(self.files.values()))


class DrawnWeights:
    """A model with drawn weights, drawn one layer at a time."""

    def __init__(self, source: BaseSource, device: torch.device):
        assert source.folder is not None and source.drawn is not None
        self.folder, self.shapes, self.device = source.folder, drawn_shapes(source.drawn), device
        parts = weights_of(self.shapes, device)
        self.others = dict(next(parts)[1])  # embedding, norm, head
        self.parts = parts

    def layers(self, groups: Groups) -> Iterator[dict[str, Tensor | Quantised]]:
        for index, (_, part) in enumerate(self.parts):
            own = f"model.layers.{index}."
            linear = [f"{name}.weight" for names in groups.values() for name in names]
            yield {name.removesuffix(".weight"): part.pop(own + name) for name in linear}
            self.others |= {name: tensor.cpu() for name, tensor in part.items()}

    def rest(self, groups: Groups) -> Iterator[tuple[str, Tensor]]:
        yield from self.others.items()

    def nbytes(self, groups: Groups) -> int:
        whole = self.shapes.linear_weights * (1 / 2 + 2 / BLOCK) + 4 * self.shapes.embedding_weights
        return int(whole)


def reader_of(
    source: BaseSource, dtype: torch.dtype, device: torch.device
) -> WeightFiles | DrawnWeights:
    if source.drawn is not None:
        return DrawnWeights(source, device)
    return WeightFiles(files_of(source))
