"""Tensors around 2^31 elements: kernels' offsets, seen at a pass's end.

Rows lie in matrices whose stride alone makes them that large, so that little is computed.
"""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 60 << 30,
        reason="needs 60 GiB of GPU memory",
    ),
]
LIMIT = 1 << 31


def off(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm())


def test_kernels_of_places_write_the_last_one():
    """Norms, the gate and rotation, one place below the limit's row and at it."""
    from glassloop.engines.fused import norm, rotary, swiglu

    width, size = 8192, 128
    tokens = LIMIT // width + 3
    torch.manual_seed(0)
    end = torch.randn(4, width, device="cuda").bfloat16()
    weight = torch.randn(width, device="cuda").bfloat16()
    x = torch.zeros(tokens, width, device="cuda", dtype=torch.bfloat16)
    x[-4:] = end
    by = rotary.angles(torch.arange(4, device="cuda"), torch.rand(size // 2, device="cuda"), 1.0)
    wide = rotary.angles(
        torch.arange(tokens, device="cuda") - (tokens - 4),
        torch.zeros(size // 2, device="cuda"),
        1.0,
    )
    wide.cos[-4:], wide.sin[-4:] = by.cos, by.sin

    out, small = torch.zeros_like(x), torch.zeros_like(end)
    norm.add_norm_triton(x, None, weight, 1e-5, out)
    norm.add_norm_reference(end, None, weight, 1e-5, small)
    assert off(out[-4:], small) < 5e-3
    rotary.rotate_triton(x, wide, out)
    rotary.rotate_reference(end, by, small)
    assert off(out[-4:], small) < 5e-3
    gated, few = out[:, : width // 2], small[:, : width // 2]
    swiglu.swiglu_triton(x, gated)
    swiglu.swiglu_reference(end, few)
    assert off(gated[-4:], few) < 5e-3


@pytest.mark.parametrize("kernel", ["triton", "flash", "cudnn"])
@pytest.mark.parametrize("beyond", [-64, 64])
def test_attention_of_a_row_whose_matrix_passes_the_limit(kernel, beyond):
    """Its last queries and keys, against the same row in a matrix of its own."""
    from glassloop.engines.fused import attention as a
    from glassloop.engines.fused.attention_work import TILES
    from glassloop.engines.fused.rotary import angles

    if kernel != "flash" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("chosen and measured on Hopper alone")
    heads, key_heads, size, width = 2, 1, 128, 20_480
    tokens = LIMIT // width + beyond
    torch.manual_seed(0)
    own = torch.randn(tokens, (heads + 2 * key_heads) * size, device="cuda").bfloat16()
    wide = torch.empty(tokens, width, device="cuda", dtype=torch.bfloat16)
    wide[:, -own.shape[1] :] = own
    grad = torch.randn(tokens, heads, size, device="cuda").bfloat16()
    by = angles(torch.arange(tokens, device="cuda"), torch.rand(size // 2, device="cuda"), 1.0)
    bounds = a.Bounds.for_kernel(kernel, (tokens,), own.device, TILES[size])
    found = []
    for matrix in (own, wide[:, -own.shape[1] :]):
        parts = matrix.split([heads * size, key_heads * size, key_heads * size], dim=1)
        q, k, v = (t.unflatten(1, (-1, size)) for t in parts)
        kept = a.attention(q, k, v, bounds)
        found.append((kept.out, a.attention_backward(grad, q, k, v, kept, bounds, by)))
    for one, truth in zip(found[1], found[0], strict=True):
        assert off(one[-256:], truth[-256:]) < 1e-2
        assert off(one, truth) < 1e-2
