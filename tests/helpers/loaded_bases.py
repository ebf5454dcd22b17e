"""A base loaded through its quantised copy."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from transformers import (
    PreTrainedModel,
)

from glassloop.base.quantised import LoadReport, load_base
from glassloop.config import ModelConfig

CPU = torch.device("cpu")
COMMIT = "c0ffee" * 6 + "abcd"


def load(
    folder: Path | str, cache_dir: Path, *, precision: str = "bf16", **model: object
) -> tuple[PreTrainedModel, LoadReport]:
    config = ModelConfig(id=str(folder), cache_dir=str(cache_dir), **model)  # type: ignore[arg-type]
    return load_base(config, precision=precision, device=CPU, first=contextlib.nullcontext)


def copies(cache_dir: Path) -> list[Path]:
    return sorted(
        path for path in (cache_dir / "quantized").iterdir() if not path.name.startswith(".")
    )
