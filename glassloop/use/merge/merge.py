"""Merged weights W + (alpha/r) B A, rounded once, in shards.

One weight and one shard are in memory at a time.

Legend: R rank of the adapters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from glassloop.use.merge.layer_weights import LayerWeights
from glassloop.use.merge.weights import INDEX, Weights

PREFIX = "base_model.model."
GIB = 2**30


@dataclass(frozen=True)
class AdapterPair:
    """The matrices of a layer's adapter: a (R, in), b (out, R)."""

    a: Tensor
    b: Tensor


def pairs_of(adapter: Mapping[str, Tensor]) -> dict[str, AdapterPair]:
    """Base weight's name -> its pair, from a saved adapter's tensors.

    Raises:
        ValueError: a tensor has no partner.
    """
    pairs = {}
    for name, tensor in adapter.items():
        if ".lora_A." in name:
            partner = adapter.get(name.replace(".lora_A.", ".lora_B."))
            if partner is None:
                raise ValueError(
                    f"the adapter has {name} without its lora_B: take an undamaged checkpoint"
                )
            pairs[name.removeprefix(PREFIX).replace(".lora_A", "")] = AdapterPair(tensor, partner)
    if 2 * len(pairs) != len(adapter):
        raise ValueError(
            f"the adapter has {len(adapter)} tensors, of which {2 * len(pairs)} are pairs of "
            "lora_A and lora_B"
        )
    return pairs


def merged(weight: Tensor, pair: AdapterPair, scale: float, dtype: torch.dtype) -> Tensor:
    """Compute weight + scale * b a in fp32, rounded once.

    A weight that is stored (in, out), as GPT-2's, keeps that order.
    """
    delta = scale * (pair.b.float() @ pair.a.float())
    if delta.shape != weight.shape and delta.T.shape == weight.shape:
        delta = delta.T
    if delta.shape != weight.shape:
        raise ValueError(
            f"the adapter changes a weight of {tuple(delta.shape)}, the base has "
            f"{tuple(weight.shape)}: name its own base"
        )
    return delta.add_(weight.float()).to(dtype)


def sixteen_bit(dtype: torch.dtype, otherwise: torch.dtype) -> torch.dtype:
    """Choose a written tensor's dtype: its own, or `otherwise` for 32 bits."""
    return otherwise if dtype in (torch.float32, torch.float64) else dtype


@dataclass(frozen=True)
class Shard:
    file: str
    names: tuple[str, ...]
    bytes: int


def shards_of(weights: Weights | LayerWeights, most_bytes: int) -> list[Shard]:
    """Deal names to files in order, as many as fit.

    A larger tensor has a file of its own.
    """
    groups: list[list[str]] = [[]]
    sizes = [0]
    for name in weights:
        size = 2 * math.prod(weights.shape(name))
        if groups[-1] and sizes[-1] + size > most_bytes:
            groups.append([])
            sizes.append(0)
        groups[-1].append(name)
        sizes[-1] += size
    if len(groups) == 1:
        return [Shard("model.safetensors", tuple(groups[0]), sizes[0])]
    of = len(groups)
    return [
        Shard(f"model-{i:05d}-of-{of:05d}.safetensors", tuple(names), sizes[i - 1])
        for i, names in enumerate(groups, 1)
    ]


def write_merged(
    weights: Weights | LayerWeights,
    pairs: Mapping[str, AdapterPair],
    scale: float,
    out: Path,
    *,
    dtype: torch.dtype,
    most_bytes: int,
) -> Iterator[tuple[Shard, int]]:
    """Write all shards and their index; yield each with its merged weights.

    Args:
        dtype: to round 32-bit tensors to; tensors of 16 bits keep theirs.

    Raises:
        ValueError: the adapter changes a weight that the base lacks, or the disk refuses a file.
    """
    if missing := [name for name in pairs if name not in weights.files]:
        raise ValueError(
            f"the adapter changes {missing[0]} ({len(missing)} such weights), which the files of "
            f"{weights.folder} do not hold under that name: it is another model's adapter. If this "
            "base is its own, merge in PEFT (merge_and_unload) instead"
        )
    shards = shards_of(weights, most_bytes)
    for shard in shards:
        tensors: dict[str, Tensor] = {}
        for name in shard.names:
            stored = weights.get(name)
            kept = sixteen_bit(stored.dtype, dtype)
            pair = pairs.get(name)
            tensors[name] = (
                merged(stored, pair, scale, kept) if pair else stored.to(kept)
            ).contiguous()
        try:
            save_file(tensors, out / shard.file, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:  # a full disk is a SafetensorError
            raise ValueError(
                f"{out / shard.file} cannot be written ({error}): make room, or name another disk"
            ) from error
        changed = sum(name in pairs for name in shard.names)
        del tensors
        yield shard, changed
    if len(shards) > 1:
        places = {name: shard.file for shard in shards for name in shard.names}
        total = sum(shard.bytes for shard in shards)
        (out / INDEX).write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1) + "\n"
        )
