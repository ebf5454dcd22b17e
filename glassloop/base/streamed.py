"""The base over a mapped file of layers, made layer by layer.

It is never whole on a card or twice on a host. The model that transformers defines is built without
weights; its 4-bit weights then become views of the file's own pages (see layer_file.py), which a
card reads through its bus. `LayerFile` hands the same pages to an engine that copies layers ahead
of their use.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from glassloop.base.checksum import base_checksum
from glassloop.base.copies import check_free_space, copy_name
from glassloop.base.dropped import free_dropped
from glassloop.base.hashing import base_hash
from glassloop.base.host_pages import HostPages, Locking
from glassloop.base.layer_file import (
    FORMAT,
    LayerFile,
    NotStreamable,
    write_layer_file,
    write_manifest,
)
from glassloop.base.layer_sources import DrawnWeights, Groups, WeightFiles, reader_of
from glassloop.base.packed import SCALE_BLOCK, Packed
from glassloop.base.quantised import LoadReport, quantized_copy
from glassloop.base.reading import (
    DTYPES,
    attention_for,
    kept_quantization,
    prepare_4bit,
)
from glassloop.base.requantised import in_sixteen_bits
from glassloop.base.source import (
    BaseError,
    BaseSource,
    damaged_copy,
    loading_errors,
    resolve_source,
)
from glassloop.config import ModelConfig
from glassloop.disk.cache import cache_root, published
from glassloop.disk.entries import in_use

GroupsOf = Callable[[Mapping[str, Any]], Groups]
COPIED = ("config.json", "generation_config.json")


def load_streamed(
    model: ModelConfig,
    groups_of: GroupsOf,
    *,
    precision: str,
    device: torch.device,
    first: Callable[[], AbstractContextManager[Any]],
    source: BaseSource | None = None,
    locking: Locking = "try",
    spare_bytes: int | None = None,
) -> tuple[PreTrainedModel, LoadReport, HostPages]:
    """Load the frozen base in NF4 over a file of layers.

    What is not quantised lies on `device`.

    Args:
        locking: whether the layers are to stay on the host (see HostPages.of).
        groups_of: a config's values -> group -> names of its linear layers in a decoder layer.
        first: context in which one rank of a host goes before the others; it makes the file.
        spare_bytes: bring layers to the device until no more than that is free; None: bring none.

    Raises:
        ValueError: naming model.id, model.cache_dir or memory.base and the cure.
        NotStreamable: for a model whose weights the file cannot hold.
    """
    started, dtype = time.monotonic(), DTYPES[precision]
    with first():
        source = source or resolve_source(model)
        notes = [source.note] if source.note else []
        _, more = kept_quantization(source, model, dtype)
        notes += more
        files_hash = base_hash(source, cache_root(model.cache_dir) / "file_hashes.json")
        folder, made = layer_folder(source, files_hash, model, groups_of, dtype, device)
        if made or spare_bytes is not None:  # or what is free would be counted too low
            free_dropped(device)
    with in_use(folder), loading_errors(model, copy=folder):
        pages = HostPages.of(LayerFile.open(folder), device, locking)
        if spare_bytes is not None and device.type == "cuda" and pages.mapped is not None:
            bring_what_fits(pages, torch.cuda.mem_get_info(device)[0] - spare_bytes)
        hf = model_over(pages, model, groups_of, dtype, device)
    checksum, expected = base_checksum(hf), pages.file.manifest.checksum
    if checksum != expected:
        pages.forget_copy()
        raise BaseError(damaged_copy(model, folder, f"checksum {checksum}, made with {expected}"))
    report = LoadReport(
        name=source.name,
        commit=source.commit,
        base_hash=files_hash,
        checksum=checksum,
        folder=str(folder),
        from_cache=not made,
        seconds=time.monotonic() - started,
        notes=(*notes, *pages.notes),
        host_bytes=pages.host_bytes if device.type == "cuda" else 0,
    )
    return hf, report, pages


def bring_what_fits(pages: HostPages, room_bytes: int) -> None:
    """Copy layers to the device, from the first up.

    They may take `room_bytes` less what is not quantised. The rest stays on the host, where the
    device reads it through its bus.
    """
    manifest = pages.file.manifest
    layers = len(manifest.layers)
    rest = manifest.nbytes - sum(layer.nbytes for layer in manifest.layers)
    count = min(layers, max(0, room_bytes - rest) // manifest.most_layer_bytes)
    for index in range(count):
        pages.bring(index)
    if count < layers:
        pages.notes += (
            f"{layers - count} of {layers} layers stay on the host: every token of an answer reads "
            f"{pages.host_bytes / 2**30:.1f} GiB of them, all questions of a batch together",
        )


def layer_folder(
    source: BaseSource,
    files_hash: str,
    model: ModelConfig,
    groups_of: GroupsOf,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Path, bool]:
    """Folder of the base as a file of layers; True if new."""
    name = copy_name(source.name, files_hash, model, dtype, device.type)
    folder = cache_root(model.cache_dir) / "layers" / f"{name}-f{FORMAT}"
    if folder.is_dir():
        return folder, False
    known = {"name": source.name, "commit": source.commit, "base_hash": files_hash}
    with in_sixteen_bits(source, model, folder) as plain:
        try:
            reader = reader_of(plain, dtype, device)
        except NotStreamable:  # other names than the model's: transformers reads them
            copy, _ = quantized_copy(source, files_hash, model, dtype, device)
            reader = WeightFiles(copy)
        _write_layers(folder, reader, known, model, groups_of, dtype, device)
    return folder, True


def _write_layers(
    folder: Path,
    reader: WeightFiles | DrawnWeights,
    known: dict[str, Any],
    model: ModelConfig,
    groups_of: GroupsOf,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Publish the file of layers, read a layer at a time."""
    with published(folder) as temporary:
        with loading_errors(model):
            config = AutoConfig.from_pretrained(reader.folder)
            if hasattr(config, "quantization_config"):
                delattr(config, "quantization_config")  # of the repository
            config.dtype = dtype
        groups = groups_of(config.to_dict())  # what it refuses is no fault of the files
        with loading_errors(model):
            config.save_pretrained(temporary)
            if (reader.folder / COPIED[1]).is_file():
                shutil.copyfile(reader.folder / COPIED[1], temporary / COPIED[1])
        check_free_space(temporary, reader.nbytes(groups))
        manifest = write_layer_file(
            temporary,
            reader.layers(groups),
            reader.rest(groups),
            groups=groups,
            known=known,
            dtype=dtype,
            double=model.double_quantization,
            device=device,
        )
        with loading_errors(model):
            pages = HostPages.of(LayerFile.open(temporary), device)
            checksum = base_checksum(model_over(pages, model, groups_of, dtype, device))
        pages.close()
        write_manifest(temporary, replace(manifest, checksum=checksum))


def model_over(
    pages: HostPages,
    model: ModelConfig,
    groups_of: GroupsOf,
    dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    """Build transformers' model with 4-bit weights that view the pages.

    The pages are as `device` sees them.
    """
    folder, file = pages.file.folder, pages.file
    config = AutoConfig.from_pretrained(folder)
    groups = groups_of(config.to_dict())
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention_for(model.attention, config)
        )
    decoder = hf.get_decoder()
    if len(decoder.layers) != len(file.manifest.layers):
        raise NotStreamable(f"{len(file.manifest.layers)} layers, not {len(decoder.layers)}")
    for index, layer in enumerate(decoder.layers):
        found = file.packed(index, pages.seen(index), pages.shared)
        for group, names in groups.items():
            put_weights(layer, names, found[group], dtype, double=file.manifest.nested)
    tied = bool(config.tie_word_embeddings)
    for name in file.manifest.rest:
        if tied and name == "lm_head.weight":
            continue
        path, _, leaf = name.rpartition(".")
        value = file.rest(name).to(device, copy=True)
        try:
            module = hf.get_submodule(path)
            fits = getattr(module, leaf).shape == value.shape
        except AttributeError as error:
            raise NotStreamable(f"{name} has no place in the model") from error
        if not fits:
            raise NotStreamable(f"{name} is {tuple(value.shape)} in its files")
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    hf.tie_weights()
    decoder.rotary_emb = type(decoder.rotary_emb)(config=config).to(device)
    embedding = hf.get_input_embeddings()
    if hasattr(embedding, "scalar_embed_scale"):  # Gemma's, in no file
        embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, device=device)
    tensors = [*hf.named_parameters(), *hf.named_buffers()]
    if missing := [name for name, tensor in tensors if tensor.is_meta]:
        raise NotStreamable(f"{missing[0]} is missing from its files")
    if (folder / COPIED[1]).is_file():
        hf.generation_config = GenerationConfig.from_pretrained(folder)
    hf.is_loaded_in_4bit = hf.is_quantized = True  # as from_pretrained says it; PEFT asks
    hf.eval().requires_grad_(False)
    prepare_4bit(hf, dtype)
    return hf


def put_weights(
    layer: nn.Module, names: Sequence[str], packed: Packed, dtype: torch.dtype, *, double: bool
) -> None:
    """Make a group's linear layers 4-bit ones over `packed`, or move them."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    make_weight: Any = Params4bit  # its signature hides behind nn.Parameter's
    start = 0
    for member, name in enumerate(names):
        plain: Any = layer.get_submodule(name)
        plain = getattr(plain, "base_layer", plain)  # beside which PEFT put an adapter
        rows, columns = packed.rows[member], packed.columns
        if (rows, columns) != (plain.out_features, plain.in_features):
            raise NotStreamable(f"{name} is ({rows}, {columns}) in its files")
        if not isinstance(plain, Linear4bit):
            bias = plain.bias is not None
            plain = Linear4bit(
                columns, rows, bias, dtype, double, "nf4", device=torch.device("meta")
            )
            layer.set_submodule(name, plain)
        state = state_of(packed, member, start, dtype)
        codes = packed.codes[start // 2 : (start + rows * columns) // 2].view(-1, 1)
        plain.weight = make_weight(
            codes,
            requires_grad=False,
            quant_state=state,
            blocksize=packed.blocksize,
            compress_statistics=double,
            quant_type="nf4",
            module=plain,
            bnb_quantized=True,
        )
        plain.quant_state = state
        start += rows * columns


def state_of(packed: Packed, member: int, start: int, dtype: torch.dtype) -> Any:
    """bitsandbytes' QuantState of one member, as views of `packed`.

    Its weights begin at `start`.
    """
    from bitsandbytes.functional import QuantState

    size = packed.rows[member] * packed.columns
    blocks = slice(start // packed.blocksize, (start + size) // packed.blocksize)
    offset = state2 = None
    if packed.nested:
        before = packed.scales_before(member)
        count = -(-(size // packed.blocksize) // SCALE_BLOCK)
        scales = packed.scales[before : before + count]
        state2 = QuantState(
            absmax=scales, blocksize=SCALE_BLOCK, code=packed.table, dtype=torch.float32
        )
        offset = packed.offsets[member]
    return QuantState(
        absmax=packed.absmax[blocks],
        shape=torch.Size((packed.rows[member], packed.columns)),
        code=packed.levels.clone(),  # one each, or base_checksum would take them for tied weights
        blocksize=packed.blocksize,
        quant_type="nf4",
        dtype=dtype,
        offset=offset,
        state2=state2,
    )
