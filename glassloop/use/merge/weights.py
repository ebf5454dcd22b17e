"""Tensors of a base, read one by one from its safetensors files.

They come as stored, or dequantised from NF4 as training used them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from glassloop.base.files import names_of_index

INDEX = "model.safetensors.index.json"
STATE = ".quant_state.bitsandbytes__nf4"  # bitsandbytes' suffix of a quantised weight's description
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE)


@dataclass(frozen=True)
class Weights:
    """A folder's tensors by name.

    Attributes:
        compute: dtype that NF4 weights are dequantised to, which training computed in; None: the
            folder holds no NF4.
    """

    folder: Path
    compute: torch.dtype | None = None

    @cached_property
    def files(self) -> dict[str, Path]:
        """Tensor -> file, parts of quantised weights among them.

        Raises:
            ValueError: the folder cannot be read.
        """
        try:
            if (self.folder / INDEX).is_file():
                listed = names_of_index(self.folder / INDEX)
                return {name: self.folder / file for name, file in listed.items()}
            found = {}
            for path in sorted(self.folder.glob("*.safetensors")):
                with safe_open(path, "pt") as file:
                    found |= dict.fromkeys(file.keys(), path)
        except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
            raise ValueError(
                f"{self.folder}: its weights cannot be read ({error}): take a complete folder"
            ) from error
        if not found:
            raise ValueError(
                f"{self.folder} has no *.safetensors: weights in pickled files (*.bin) are not "
                "merged; load the model in transformers "
                "where you trust it, and save_pretrained it again"
            )
        return found

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of whole weights, in the order of the files."""
        return tuple(name for name in self.files if not (self.compute and name.endswith(PARTS)))

    def quantised(self, name: str) -> bool:
        return self.compute is not None and name + STATE in self.files

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole weight, as a linear layer has it."""
        if self.quantised(name):
            return tuple(json.loads(bytes(self._stored(name + STATE).tolist()))["shape"])
        try:
            with safe_open(self.files[name], "pt") as file:
                return tuple(file.get_slice(name).get_shape())
        except (OSError, SafetensorError) as error:
            raise _torn(self.files[name], error) from error

    def get(self, name: str) -> Tensor:
        """Load the weight as stored; NF4 rounded as in training."""
        if not self.quantised(name):
            return self._stored(name)
        assert self.compute is not None
        return dequantised(self._stored(name), self._parts(name)).to(self.compute)

    def _parts(self, name: str) -> dict[str, Any]:
        return {
            part.removeprefix("."): self._stored(name + part)
            for part in PARTS
            if name + part in self.files
        }

    def _stored(self, name: str) -> Tensor:
        try:
            with safe_open(self.files[name], "pt") as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise _torn(self.files[name], error) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)


def dequantised(packed: Tensor, parts: dict[str, Any]) -> Tensor:
    """Dequantise packed bytes to (out, in), by bitsandbytes' own code."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = QuantState.from_dict(dict(parts), device=torch.device("cpu"))
    return dequantize_4bit(packed, state)


def _torn(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} cannot be read ({error}): it is missing, cut short or no safetensors file; fetch "
        "the base again"
    )
