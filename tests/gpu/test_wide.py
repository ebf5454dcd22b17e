"""Tensors around 2^31 elements. Each test takes seconds and at most 40 GiB."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from wide import ROUNDED, attention_check, places_check, product_check

MOST_GIB = 40
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < MOST_GIB << 30,
        reason=f"needs {MOST_GIB} GiB of free GPU memory",
    ),
]
LIMIT, CUDA = 1 << 31, torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _within_its_memory() -> Iterator[None]:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.empty_cache()
    assert peak < MOST_GIB, f"{peak:.1f} GiB"


def test_kernels_of_places_write_the_rows_at_the_limit():
    found = places_check(LIMIT, CUDA, width=8192, suffix="triton")
    assert {name: far for name, far in found.items() if not far < ROUNDED} == {}


def test_a_product_that_passes_the_limit_is_right_in_its_last_rows():
    """An 8B's gate and up, of a row of 75,000 tokens."""
    assert product_check(LIMIT, CUDA, width=28_720) < ROUNDED


@pytest.mark.parametrize("kernel", ["triton", "flash", "cudnn"])
@pytest.mark.parametrize("beyond", [-64, 64])
def test_attention_of_a_row_whose_matrix_passes_the_limit(kernel, beyond):
    if kernel != "flash" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("chosen and measured on Hopper alone")
    found = attention_check(kernel, LIMIT, beyond, CUDA, width=40_960)
    assert {name: far for name, far in found.items() if not far < 2 * ROUNDED} == {}
