"""The one place where the engine's kernels are launched.

A meta tensor has a dtype and strides but no memory. A kernel that is given one is compiled and not
launched: see rehearsal.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

Grid = tuple[Any, ...]  # of whole numbers; Triton types its own as constants


def by_kernels(tensor: Tensor) -> bool:
    """True if kernels compute what is on this tensor's device."""
    return tensor.is_cuda or tensor.is_meta


def capability(device: torch.device) -> int:
    """Compute capability times 10: 86, 90, ...

    A meta device stands for the card that kernels are compiled for.
    """
    if device.type == "meta":
        active: Any = triton.runtime.driver.active
        return int(active.get_current_target().arch)
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch(kernel: Any, grid: Grid, first: Tensor, *args: Any, **options: Any) -> None:
    """Launch `kernel` over `grid`, or compile it alone.

    Args:
        first: the kernel's first argument, on the device of them all.
        options: the kernel's constants, and those of the launch (num_warps, ...).
    """
    if first.is_meta:
        kernel.warmup(first, *args, grid=grid, **options)
    else:
        kernel[grid](first, *args, **options)
