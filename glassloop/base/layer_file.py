"""The quantised base as one file: a layer is one aligned blob.

A folder of it holds config.json (and generation_config.json), `base.bin` and a manifest. `base.bin`
begins with the layers, each a blob of codes, absmax and scales of its groups, and ends with what is
not quantised: embedding, head, norms, biases. It is mapped, never read whole, so all ranks and runs
of a host share the page cache's one copy of it.
"""

from __future__ import annotations

import json
import mmap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glassloop.base.packed import SCALE_BLOCK, Packed
from glassloop.base.source import BaseError
from glassloop.disk.entries import share

FORMAT = 1
BLOBS, MANIFEST = "base.bin", "glassloop_layers.json"
BLOCK = 64  # weights that share an absmax
PART, LAYER = 256, 4096  # bytes: a part begins at a multiple of one, a layer of the other
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class NotStreamable(BaseError):
    """A base that does not fit the file, by the weight's name."""


@dataclass(frozen=True)
class GroupPlace:
    """Offsets and sizes of a group's parts in its layer's blob.

    In bytes. `offsets` are the fp32 numbers added to each member's absmax; empty without double
    quantisation.
    """

    rows: tuple[int, ...]
    columns: int
    codes: tuple[int, int]
    absmax: tuple[int, int]
    scales: tuple[int, int]
    offsets: tuple[float, ...]


@dataclass(frozen=True)
class LayerPlace:
    """Place of a layer's blob in the file."""

    offset: int
    nbytes: int
    groups: dict[str, GroupPlace]


@dataclass(frozen=True)
class RestPlace:
    """Place of an unquantised tensor in the file."""

    offset: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class LayerManifest:
    """Contents of the file.

    `checksum` is base_checksum of a model over it, once one was built.
    """

    name: str
    commit: str | None
    base_hash: str
    dtype: str
    nested: bool
    levels: tuple[float, ...]
    table: tuple[float, ...]
    layers: tuple[LayerPlace, ...]
    rest: dict[str, RestPlace]
    nbytes: int
    checksum: int | None = None
    format: int = FORMAT

    @property
    def most_layer_bytes(self) -> int:
        return max(layer.nbytes for layer in self.layers)


def read_manifest(folder: Path) -> LayerManifest:
    """Read a folder's manifest.

    Raises ValueError if it is damaged or the file is cut short.
    """
    try:
        raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if raw["format"] != FORMAT:
            raise ValueError(f"format {raw['format']}, this version reads {FORMAT}")
        layers = tuple(
            LayerPlace(
                one["offset"],
                one["nbytes"],
                {name: _group_place(place) for name, place in one["groups"].items()},
            )
            for one in raw.pop("layers")
        )
        rest = {
            name: RestPlace(one["offset"], tuple(one["shape"]), one["dtype"])
            for name, one in raw.pop("rest").items()
        }
        levels, table = tuple(raw.pop("levels")), tuple(raw.pop("table"))
        found = LayerManifest(layers=layers, rest=rest, levels=levels, table=table, **raw)
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged ({error!r})") from error
    size = (folder / BLOBS).stat().st_size
    if size != found.nbytes:
        raise ValueError(f"{folder / BLOBS} has {size:,} bytes, made with {found.nbytes:,}")
    return found


def _group_place(raw: dict[str, Any]) -> GroupPlace:
    parts = {name: tuple(raw[name]) for name in ("rows", "codes", "absmax", "scales", "offsets")}
    return GroupPlace(columns=raw["columns"], **parts)


@dataclass
class LayerFile:
    """A mapped file. Its tensors are read-only."""

    folder: Path
    manifest: LayerManifest
    memory: Tensor = field(repr=False)  # (bytes,) uint8, on the CPU, the file's own pages

    @classmethod
    def open(cls, folder: Path) -> LayerFile:
        """Map a folder's file. Raises ValueError for a damaged one."""
        manifest = read_manifest(folder)
        with open(folder / BLOBS, "rb") as file:
            share(file.fileno())  # for as long as the mapping lives
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable.*")
            return cls(folder, manifest, torch.frombuffer(pages, dtype=torch.uint8))

    def layer(self, index: int) -> Tensor:
        """(bytes,) uint8: a layer's blob."""
        place = self.manifest.layers[index]
        return self.memory[place.offset : place.offset + place.nbytes]

    def rest(self, name: str) -> Tensor:
        """An unquantised tensor."""
        place = self.manifest.rest[name]
        dtype, count = DTYPES[place.dtype], 1
        for extent in place.shape:
            count *= extent
        raw = self.memory[place.offset : place.offset + count * dtype.itemsize]
        return raw.view(dtype).view(place.shape)

    def packed(self, index: int, blob: Tensor, shared: Shared) -> dict[str, Packed]:
        """Map each group to its weights, views of a layer's blob.

        `blob`: a copy of it on any device.
        """
        found = {}
        for name, place in self.manifest.layers[index].groups.items():
            codes, absmax, scales = (
                blob[at : at + size] for at, size in (place.codes, place.absmax, place.scales)
            )
            nested = self.manifest.nested
            found[name] = Packed(
                codes=codes,
                absmax=absmax if nested else absmax.view(torch.float32),
                scales=scales.view(torch.float32),
                table=shared.table,
                offsets=shared.offsets[index, name],
                levels=shared.levels,
                rows=place.rows,
                columns=place.columns,
                blocksize=BLOCK,
            )
        return found

    def shared(self, device: torch.device) -> Shared:
        """Tables that all layers read besides their blobs, on `device`."""

        def there(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32).to(device)

        sizes = [
            (index, name, place.offsets)
            for index, layer in enumerate(self.manifest.layers)
            for name, place in layer.groups.items()
        ]
        flat = there([value for *_, offsets in sizes for value in offsets])
        offsets, start = {}, 0
        for index, name, values in sizes:
            offsets[index, name] = flat[start : start + len(values)]
            start += len(values)
        return Shared(there(self.manifest.levels), there(self.manifest.table), offsets)


@dataclass(frozen=True)
class Shared:
    """Tables on a device.

    levels (16,), table (256,) or (0,), offsets (members,) by group.
    """

    levels: Tensor
    table: Tensor
    offsets: dict[tuple[int, str], Tensor]


def write_layer_file(
    folder: Path,
    layers: Iterator[dict[str, Tensor | Quantised]],
    rest: Iterator[tuple[str, Tensor]],
    *,
    groups: Mapping[str, Sequence[str]],
    known: Mapping[str, Any],
    dtype: torch.dtype,
    double: bool,
    device: torch.device,
) -> LayerManifest:
    """Write `base.bin` and its manifest, one layer at a time.

    Args:
        layers: of each layer, its linear weights (N, K) by the name within the layer, without
            ".weight"; or `Quantised` ones, as a repository that comes quantised has them.
        rest: what is not quantised, by its whole name.
        groups: group -> names of its members, as `layers` has them.
        known: name, commit and base_hash of the manifest.
        dtype: of the unquantised weights, and the one that linear weights have when they are
            quantised.
        double: quantise the absmax as well.
        device: where weights are quantised.

    Raises:
        NotStreamable: naming the weight whose form the file cannot hold.
    """
    levels: tuple[float, ...] = ()
    table: tuple[float, ...] = ()
    places: list[LayerPlace] = []
    others: dict[str, RestPlace] = {}
    with open(folder / BLOBS, "xb") as file:
        for index, weights in enumerate(layers):
            begin = _pad(file, LAYER)
            found: dict[str, GroupPlace] = {}
            for group, names in groups.items():
                states = [quantised(weights[name], dtype, double, device) for name in names]
                for name, (_, state) in zip(names, states, strict=True):
                    own = (tuple(state.code.tolist()), _table(state))
                    if levels and own != (levels, table):
                        raise NotStreamable(f"layer {index} {name} has a table of its own")
                    levels, table = own
                found[group] = _write_group(file, begin, states)
            places.append(LayerPlace(begin, file.tell() - begin, found))
        for name, tensor in rest:
            at = _pad(file, PART)
            value = tensor.to(dtype).cpu().contiguous()
            file.write(_bytes(value))
            others[name] = RestPlace(at, tuple(value.shape), str(dtype).removeprefix("torch."))
        _pad(file, LAYER)
        nbytes = file.tell()
    manifest = LayerManifest(
        **known,
        dtype=str(dtype).removeprefix("torch."),
        nested=bool(table),
        levels=levels,
        table=table,
        layers=tuple(places),
        rest=others,
        nbytes=nbytes,
    )
    write_manifest(folder, manifest)
    return manifest


def write_manifest(folder: Path, manifest: LayerManifest) -> None:
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest)), encoding="utf-8")


@dataclass(frozen=True)
class Quantised:
    """A weight that a repository holds in NF4, with bitsandbytes' state."""

    codes: Tensor
    state: Any


def quantised(
    weight: Tensor | Quantised, dtype: torch.dtype, double: bool, device: torch.device
) -> tuple[Tensor, Any]:
    """Codes and bitsandbytes' QuantState of a weight, as transformers would quantise it."""
    if isinstance(weight, Quantised):
        return weight.codes, weight.state
    import bitsandbytes.functional as bnb

    there = weight.to(device=device, dtype=dtype).contiguous()
    return bnb.quantize_4bit(there, blocksize=BLOCK, quant_type="nf4", compress_statistics=double)


def _table(state: Any) -> tuple[float, ...]:
    return tuple(state.state2.code.tolist()) if state.nested else ()


def _write_group(file: Any, begin: int, members: Sequence[tuple[Tensor, Any]]) -> GroupPlace:
    """Write a group's parts, each at a multiple of PART."""
    for codes, state in members:
        if state.quant_type != "nf4" or state.blocksize != BLOCK or state.shape[1] % BLOCK:
            raise NotStreamable(
                f"a weight {tuple(state.shape)} in {state.quant_type}, {state.blocksize} a block"
            )
        if state.nested and state.state2.blocksize != SCALE_BLOCK:
            raise NotStreamable(f"{state.state2.blocksize} absmax share a scale")
        assert codes.numel() * codes.element_size() * 2 == state.shape.numel()
    states = [state for _, state in members]
    nested = states[0].nested

    def put(tensors: Sequence[Tensor]) -> tuple[int, int]:
        at = _pad(file, PART)
        for tensor in tensors:
            file.write(_bytes(tensor.detach().cpu().contiguous()))
        return at - begin, file.tell() - at

    return GroupPlace(
        rows=tuple(int(state.shape[0]) for state in states),
        columns=int(states[0].shape[1]),
        codes=put([codes for codes, _ in members]),
        absmax=put([state.absmax for state in states]),
        scales=put([state.state2.absmax for state in states] if nested else []),
        offsets=tuple(float(state.offset) for state in states) if nested else (),
    )


def _bytes(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _pad(file: Any, multiple: int) -> int:
    file.write(b"\0" * (-file.tell() % multiple))
    return file.tell()
