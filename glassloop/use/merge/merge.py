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

from glassloop.config import LoraConfig
from glassloop.use.merge.layer_weights import LayerWeights
from glassloop.use.merge.weights import INDEX, Weights

PREFIX = "base_model.model."
GIB = 2**30


TOKENS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class AdapterPair:
    """An adapter's matrices a (R, in), b (out, R), and their factor."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class TrainedRows:
    """Trained rows (K, H) of an embedding, and their places."""

    rows: Tensor
    places: tuple[int, ...]


def pairs_of(
    adapter: Mapping[str, Tensor], lora: LoraConfig
) -> dict[str, AdapterPair | TrainedRows]:
    """Base weight's name -> its change, from a saved adapter's tensors.

    Raises:
        ValueError: a tensor has no partner, or is none that is merged here.
    """
    if lora.target_parameters:
        raise ValueError(
            f"lora.target_parameters = {', '.join(lora.target_parameters)}: adapters of experts "
            "are not merged here; merge the checkpoint in PEFT (merge_and_unload)"
        )
    pairs: dict[str, AdapterPair | TrainedRows] = {}
    seen = 0
    for name, tensor in adapter.items():
        if TOKENS in name:
            places = lora.trainable_token_indices
            if len(places) != len(tensor):
                raise ValueError(
                    f"the adapter has {len(tensor)} rows in {name}, its config names "
                    f"{len(places)} tokens: take an undamaged checkpoint"
                )
            pairs[name.removeprefix(PREFIX).replace(TOKENS, ".weight")] = TrainedRows(
                tensor, places
            )
            seen += 1
        if ".lora_A." in name:
            partner = adapter.get(name.replace(".lora_A.", ".lora_B."))
            if partner is None:
                raise ValueError(
                    f"the adapter has {name} without its lora_B: take an undamaged checkpoint"
                )
            weight = name.removeprefix(PREFIX).replace(".lora_A", "")
            scale = lora.scale_of(weight.removesuffix(".weight"))
            pairs[weight] = AdapterPair(tensor, partner, scale)
            seen += 2
    if seen != len(adapter):
        raise ValueError(
            f"the adapter has {len(adapter)} tensors, of which {seen} are pairs of "
            "lora_A and lora_B or rows of an embedding"
        )
    return pairs


def merged(weight: Tensor, pair: AdapterPair | TrainedRows, dtype: torch.dtype) -> Tensor:
    """Compute weight + scale * b a in fp32, rounded once.

    Trained rows replace those in their places. A weight that is stored (in, out), as GPT-2's,
    keeps that order.
    """
    if isinstance(pair, TrainedRows):
        if pair.rows.shape[1] != weight.shape[1] or max(pair.places) >= len(weight):
            raise ValueError(
                f"the adapter has rows {max(pair.places)} of width {pair.rows.shape[1]} for an "
                f"embedding of {tuple(weight.shape)}: name its own base"
            )
        return weight.to(dtype).index_copy(0, torch.tensor(pair.places), pair.rows.to(dtype))
    delta = pair.scale * (pair.b.float() @ pair.a.float())
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
    pairs: Mapping[str, AdapterPair | TrainedRows],
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
            tensors[name] = (merged(stored, pair, kept) if pair else stored.to(kept)).contiguous()
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
