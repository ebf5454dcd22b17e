"""Names of quantised copies, and the room that they need."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import torch

from glassloop.base.source import BaseError
from glassloop.config import ModelConfig

FORMAT = 1  # of a cached folder


def check_free_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BaseError(
            f"model.cache_dir: the quantised base needs {needed / 2**30:.1f} GiB and "
            f"{folder.parent} has {free / 2**30:.1f} GiB free: "
            "make room, or set model.cache_dir to a larger disk"
        )


def copy_name(
    name: str, files_hash: str, model: ModelConfig, dtype: torch.dtype, device_type: str
) -> str:
    """Folder name of a quantised copy: readable, then 16 hex digits.

    The digits hash all that decides its bytes. The device's type is among them: kernels of a CPU
    and a GPU may round a scale differently.
    """
    decides = {
        "format": FORMAT,
        "base": files_hash,
        "quantization": [
            "nf4",
            64,
            model.double_quantization,
            "uint8",
        ],  # type, block, scales quantised, storage
        "dtype": str(dtype),
        "bitsandbytes": ".".join(version("bitsandbytes").split(".")[:2]),
        "device": device_type,
        "own code": model.trust_remote_code,
    }
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
    return f"{re.sub(r'[^A-Za-z0-9.]+', '-', name.rstrip('/').split('/')[-1])[:60]}-nf4-{key}"
