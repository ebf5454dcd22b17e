"""Bases in FP8 or MXFP4, widened to 16 bits, for NF4.

FP8, as DeepSeek and Qwen publish it: weights (N, K) in float8_e4m3fn beside `weight_scale_inv`, a
factor for every block of 128 x 128. MXFP4, as gpt-oss has it: experts (E, N, K/32, 16) in bytes of
two numbers beside an exponent for every 32 of them.

Legend: E experts, N outputs, K inputs.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from glassloop.base.copies import check_free_space
from glassloop.base.files import names_of_index
from glassloop.base.reading import own_quantization
from glassloop.base.source import BaseError, BaseSource, files_of, loading_errors
from glassloop.config import ModelConfig
from glassloop.config.quantised import REQUANTISED

SCALE, BLOCKS, SCALES = "_scale_inv", "_blocks", "_scales"
ACTIVATIONS = (".input_scale", ".activation_scale")  # of inputs, which are not quantised here
# Values of the 16 codes of a 4-bit number: a sign, two bits of exponent, one of mantissa.
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SHARD_BYTES = 2 << 30


def kind_of(own: Mapping[str, Any] | None) -> str | None:
    """fp8 or mxfp4, of a repository's quantization_config; None for anything else."""
    kind = str((own or {}).get("quant_method"))
    return kind if kind in REQUANTISED else None


def from_fp8(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """(N, K) bf16 of float8 and a factor for every block.

    Raises ValueError if they do not fit.
    """
    grid = tuple(-(-size // step) for size, step in zip(weight.shape, block, strict=True))
    if tuple(scale.shape) != grid or scale.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"scales {tuple(scale.shape)} {scale.dtype}, not {grid} in float32")
    rows, columns = weight.shape
    wide = scale.float().repeat_interleave(block[0], 0)[:rows]
    wide = wide.repeat_interleave(block[1], 1)[:, :columns]
    return (weight.float() * wide).bfloat16()


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """(E, K, N) bf16 of bytes and exponents.

    blocks: (E, N, K/32, 16). scales: (E, N, K/32).

    Raises ValueError if they do not fit.
    """
    if blocks.ndim != 4 or blocks.shape[:-1] != scales.shape or blocks.dtype != torch.uint8:
        raise ValueError(f"blocks {tuple(blocks.shape)}, scales {tuple(scales.shape)}")
    values = torch.tensor([*FP4, *(-one for one in FP4)])
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).int()  # (E, N, K/32, 32)
    exponents = scales.int().unsqueeze(-1) - 127
    numbers = torch.ldexp(values[codes], exponents)
    return numbers.flatten(-2).transpose(1, 2).contiguous().bfloat16()


@contextmanager
def in_sixteen_bits(source: BaseSource, model: ModelConfig, beside: Path) -> Iterator[BaseSource]:
    """A source of plain files: `source`, or a temporary folder.

    Args:
        beside: the folder to be made of it; the temporary one lies there.

    Raises:
        BaseError: naming model.id and a tensor that is missing or has another form; or no room.
    """
    own = own_quantization(source, model)
    if kind_of(own) is None:
        yield source
        return
    assert own is not None
    beside.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{beside.name}.", dir=beside.parent) as where:
        with loading_errors(model):
            _write(files_of(source), Path(where), own, model.id)
        yield replace(source, folder=Path(where))


def _write(folder: Path, where: Path, own: Mapping[str, Any], model_id: str) -> None:
    """Write weights in 16 bits, and a config without a quantization."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values.pop("quantization_config", None)
    (where / "config.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
    for file in [folder / "generation_config.json", *folder.glob("*.py")]:
        if file.is_file():
            shutil.copyfile(file, where / file.name)
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    check_free_space(where, stored * (2 if kind_of(own) == "fp8" else 4))
    shard, size, weight_map = dict[str, Tensor](), 0, dict[str, str]()

    def save() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, where / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))

    for name, tensor in widened(folder, own, model_id):
        if shard and size + tensor.nbytes > SHARD_BYTES:
            save()
            shard, size = {}, 0
        shard[name], size = tensor.contiguous(), size + tensor.nbytes
    save()
    index = {"metadata": {}, "weight_map": weight_map}
    (where / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def widened(folder: Path, own: Mapping[str, Any], model_id: str) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight of a folder, widened, under its plain name.

    Raises BaseError naming a tensor that has another form.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        files = names_of_index(index)
    else:
        with safe_open(single, framework="pt") as opened:
            files = dict.fromkeys(opened.keys(), single.name)
    block = tuple(own.get("weight_block_size") or ())

    def get(name: str) -> Tensor:
        try:
            with safe_open(folder / files[name], framework="pt") as opened:
                return opened.get_tensor(name)
        except (KeyError, SafetensorError) as error:
            raise BaseError(
                f"model.id = {model_id}: {name} is missing from its files ({error}): take a "
                "complete repository"
            ) from error

    for name in files:
        if name.endswith((SCALE, *ACTIVATIONS)) or (
            name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS in files
        ):
            continue
        tensor, plain = get(name), name.removesuffix(BLOCKS)
        try:
            if plain != name:
                tensor = from_mxfp4(tensor, get(plain + SCALES))
            elif tensor.dtype == torch.float8_e4m3fn:
                if len(block) != 2 or tensor.ndim != 2:
                    raise ValueError(f"weight_block_size = {list(block)}, not two sizes")
                tensor = from_fp8(tensor, get(name + SCALE), block)  # type: ignore[arg-type]
            elif tensor.element_size() == 1:
                raise ValueError(f"it is {tensor.dtype}")
        except BaseError:
            raise
        except ValueError as error:
            raise BaseError(
                f"model.id = {model_id}: {name} has a form that is not read here ({error}): take "
                "the unquantised repository"
            ) from error
        yield plain, tensor
