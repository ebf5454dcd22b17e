"""fp32 matrix products on AMD processors with AVX-512.

torch computes them with MKL, which does not use AVX-512 on a processor of another maker. oneDNN
does: on an EPYC of family 26 it reached 240 GFLOP/s a core, MKL 110. Both sum in fp32; the order
of a sum differs. Other processors, other dtypes and small products stay with torch's choice.
"""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SMALLEST = 500_000  # multiplications; below it the call itself costs more


@cache
def use_onednn() -> torch.library.Library | None:
    """Let oneDNN compute this process's fp32 products from here on, where it is the faster.

    Returns the library that holds the kernel; None: torch's own choice stays.
    """
    if not is_faster():
        return None
    library = torch.library.Library("aten", "IMPL")  # in place as long as the cache holds it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a kernel is replaced: that is the purpose
        library.impl("mm", product, "CPU")
    return library


def is_faster(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """True on an AMD processor with AVX-512, under a torch that has both libraries."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not cpuinfo.is_file():
        return False
    return "AuthenticAMD" in cpuinfo.read_text(errors="replace")[:4096]


def product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply two matrices.

    Args:
        a: (M, K).
        b: (K, N).
    """
    fp32 = a.dtype == b.dtype == torch.float32 and a.layout == b.layout == torch.strided
    fits = a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0]
    large = fits and a.shape[0] * b.shape[0] * b.shape[1] >= SMALLEST
    if fp32 and large and torch.backends.mkldnn.enabled:
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return torch.mm(a, b, out=a.new_empty(0))  # torch's own; `mm.out` is not replaced
