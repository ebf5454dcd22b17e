"""The frozen base on the rank's device, from an NF4 copy.

Quantising 8B weights reads 16 GB. The copy is made once, has 6 GB, and every rank of every later
launch reads it. Its folder's name is a hash of all that decides its bytes. It appears by a rename.
What was loaded from it is compared with the checksum taken when it was made.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)

from glassloop.base.checksum import base_checksum
from glassloop.base.copies import check_free_space, copy_name
from glassloop.base.dropped import free_dropped
from glassloop.base.hashing import base_hash
from glassloop.base.random import drawn_shapes, fill, write_nf4
from glassloop.base.reading import (
    DTYPES,
    attention_for,
    check_attention,
    kept_quantization,
    read_model,
)
from glassloop.base.requantised import in_sixteen_bits
from glassloop.base.saving import save_pretrained_here
from glassloop.base.source import (
    BaseError,
    BaseSource,
    damaged_copy,
    downloaded,
    loading_errors,
    resolve_source,
)
from glassloop.config import ModelConfig
from glassloop.disk.cache import cache_root, published
from glassloop.disk.entries import in_use

MANIFEST = "glassloop_base.json"
# Files of a copy up to this size are compared by content, larger ones by size and what they load.
HASHED_BYTES = 1 << 20


@dataclass(frozen=True)
class LoadReport:
    """Origin and checksum of a loaded base.

    Attributes:
        name, commit: what adapter_config.json will say; commit is None for a local folder.
        base_hash: 64 hex digits that stand for the base's files (see base_source.base_hash).
        checksum: of the loaded tensors' bytes (see base_checksum); equal on ranks that hold the
            same base.
        folder: what was read; None: the hub's own cache.
        from_cache: a quantised copy was read and nothing was quantised.
        seconds: whole time of loading, waiting for another rank included.
        notes: what a person should know, a line each.
        host_bytes: of 4-bit weights that a GPU reads from the host, through its bus.
    """

    name: str
    commit: str | None
    base_hash: str
    checksum: int
    folder: str | None
    from_cache: bool
    seconds: float
    notes: tuple[str, ...]
    host_bytes: int = 0


def load_base(
    model: ModelConfig,
    *,
    precision: str,
    device: torch.device,
    first: Callable[[], AbstractContextManager[Any]],
    source: BaseSource | None = None,
) -> tuple[PreTrainedModel, LoadReport]:
    """Load the frozen base onto `device`.

    Linear layers are in NF4, or all of it in the dtype of `precision`.

    Args:
        first: context in which one rank of a host goes before the others: it downloads and
            quantises, they find it done.

    Raises:
        ValueError: naming model.id, model.attention, model.quantization or
            model.trust_remote_code and the cure; or a damaged copy.
    """
    started, dtype = time.monotonic(), DTYPES[precision]
    if model.attention == "flash_attention_2" and precision == "fp32":
        raise BaseError(
            "model.attention = flash_attention_2 has no fp32: set model.attention=sdpa or "
            "execution.precision=bf16"
        )
    copy: Path | None = None
    hf: PreTrainedModel | None = None
    made = False
    with first():
        source = source or resolve_source(model)
        notes = [source.note] if source.note else []
        own, more = kept_quantization(source, model, dtype)
        check_attention(source, model)
        notes += more
        files_hash = base_hash(source, cache_root(model.cache_dir) / "file_hashes.json")
        if own is None and model.quantization == "nf4":
            copy, made = quantized_copy(source, files_hash, model, dtype, device)
            if made:
                free_dropped(device)
        elif source.drawn is not None:
            hf = _draw(source, model, dtype, device)
        else:
            hf = read_model(source.path, source.revision, model, dtype, device)
    if copy is not None:
        hf, checksum = _load_copy(copy, model, dtype, device, made=made)
    else:
        assert hf is not None
        checksum = base_checksum(hf)
    folder = copy or source.folder
    report = LoadReport(
        name=source.name,
        commit=source.commit,
        base_hash=files_hash,
        checksum=checksum,
        folder=str(folder) if folder else None,
        from_cache=copy is not None and not made,
        seconds=time.monotonic() - started,
        notes=tuple(notes),
    )
    return hf, report


def find_base(
    model: ModelConfig,
    *,
    precision: str,
    device: torch.device,
    first: Callable[[], AbstractContextManager[Any]],
    source: BaseSource | None = None,
) -> LoadReport:
    """Report what load_base would, for an engine that loads the files itself.

    A base in NF4 only; quantises it if need be. `folder` is always set. A base that comes quantised
    is loaded once for its checksum, and dropped. Raises what load_base raises.
    """
    started, dtype = time.monotonic(), DTYPES[precision]
    with first():
        source = source or resolve_source(model)
        copy = None
        own, notes = kept_quantization(source, model, dtype)
        check_attention(source, model)
        if own is None:
            files_hash = base_hash(source, cache_root(model.cache_dir) / "file_hashes.json")
            copy, made = quantized_copy(source, files_hash, model, dtype, device)
            if made:
                free_dropped(device)
    if copy is None:
        shared: dict[str, Any] = dict(precision=precision, device=device, first=first)
        _, report = load_base(model, **shared, source=source)
        return report if report.folder else replace(report, folder=str(downloaded(source)))
    return LoadReport(
        name=source.name,
        commit=source.commit,
        base_hash=files_hash,
        checksum=_checksum_of_copy(copy, model),
        folder=str(copy),
        from_cache=not made,
        seconds=time.monotonic() - started,
        notes=(*([source.note] if source.note else []), *notes),
    )


def _draw(
    source: BaseSource, model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """An unquantised base with drawn weights."""
    assert source.drawn is not None
    with loading_errors(model), device:
        config = AutoConfig.from_pretrained(source.path)
        hf = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention_for(model.attention, config)
        )
    fill(hf, drawn_shapes(source.drawn), device)
    return hf.eval().requires_grad_(False)  # as from_pretrained leaves it


def quantized_copy(
    source: BaseSource,
    files_hash: str,
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Path, bool]:
    """Folder of the base in NF4, and whether it was made now."""
    folder = (
        cache_root(model.cache_dir)
        / "quantized"
        / copy_name(source.name, files_hash, model, dtype, device.type)
    )
    if folder.is_dir():
        return folder, False
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=model.double_quantization,
        bnb_4bit_compute_dtype=dtype,
    )
    hf = None
    if not source.drawn:
        with in_sixteen_bits(source, model, folder) as plain:
            hf = read_model(plain.path, plain.revision, model, dtype, device, quantize=settings)
    with published(folder) as temporary:
        if hf is None:
            assert source.drawn is not None and source.folder is not None
            shapes = drawn_shapes(source.drawn)
            check_free_space(
                temporary, shapes.weights
            )  # more than it takes: the linear layers' are half a byte each
            form = settings.to_dict()
            write_nf4(
                temporary,
                source.folder,
                shapes,
                quantization=form,
                double=model.double_quantization,
                dtype=dtype,
                device=device,
            )
            hf = read_model(str(temporary), None, model, dtype, device)
        else:
            check_free_space(temporary, hf.get_memory_footprint())
            generation, hf.generation_config = hf.generation_config, GenerationConfig()
            save_pretrained_here(hf, temporary)
            if generation is not None:  # as it came: save_pretrained refuses some that hubs hold
                generation.to_json_file(temporary / "generation_config.json")
        files = {
            str(f.relative_to(temporary)): _file_entry(f)
            for f in sorted(temporary.rglob("*"))
            if f.is_file()
        }
        manifest = {
            "name": source.name,
            "commit": source.commit,
            "base_hash": files_hash,
            "checksum": base_checksum(hf),
            "files": files,
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
    return folder, True


def _file_entry(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    return {
        "bytes": size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest() if size <= HASHED_BYTES else None,
    }


def _checksum_of_copy(folder: Path, model: ModelConfig) -> int:
    """Checksum that a quantised copy was made with.

    Raises BaseError naming a file that is not as it was made.
    """
    with loading_errors(model, copy=folder):
        manifest = json.loads((folder / MANIFEST).read_text())
        expected, files = manifest["checksum"], manifest["files"]
        for name, entry in files.items():
            if _file_entry(folder / name) != entry:
                raise BaseError(damaged_copy(model, folder, name))
    return expected


def _load_copy(
    folder: Path, model: ModelConfig, dtype: torch.dtype, device: torch.device, *, made: bool
) -> tuple[PreTrainedModel, int]:
    """Load a quantised copy and compare it with its checksum.

    `made`: a moment ago, so that a failure is no damage, and the copy goes. Raises BaseError naming
    a damaged folder, or what an architecture fails at.
    """
    expected = _checksum_of_copy(folder, model)
    try:
        with in_use(folder), loading_errors(model, copy=folder):
            hf = read_model(str(folder), None, model, dtype, device, copy=folder)
    except BaseError as error:
        if not made:
            raise
        shutil.rmtree(folder, ignore_errors=True)
        cause = error.__cause__ or error
        raise BaseError(
            f"model.id = {model.id} was quantised, and transformers cannot load its NF4 weights "
            f"({type(cause).__name__}: {str(cause).strip()[:300]}): it does not support this "
            "architecture in 4 bits. Set model.quantization=none, or take another model"
        ) from error
    checksum = base_checksum(hf)
    if checksum != expected:
        raise BaseError(damaged_copy(model, folder, f"checksum {checksum}, made with {expected}"))
    return hf, checksum
