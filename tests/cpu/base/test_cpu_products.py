"""fp32 products through oneDNN are torch's products, but for the order of a sum."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from glassloop.base import cpu_products
from glassloop.base.cpu_products import SMALLEST, is_faster, product

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """First operands of the products that oneDNN computed."""
    seen: list[Tensor] = []
    kernel = torch.ops.mkldnn._linear_pointwise

    def counted(a: Tensor, *rest: object) -> Tensor:
        seen.append(a)
        return kernel(a, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    return seen


@needs_onednn
@pytest.mark.parametrize("rows", [1, 7, 96])
@pytest.mark.parametrize("turned", ["neither", "a", "b", "both"])
def test_a_product_is_exact_within_fp32_for_every_order_of_strides(
    rows: int, turned: str, calls: list[Tensor]
) -> None:
    torch.manual_seed(rows)
    a, b = torch.randn(rows, 640), torch.randn(640, 1024)
    if turned in ("a", "both"):
        a = a.t().contiguous().t()
    if turned in ("b", "both"):
        b = b.t().contiguous().t()
    exact = a.double() @ b.double()
    error = torch.linalg.vector_norm(product(a, b) - exact) / torch.linalg.vector_norm(exact)
    assert error < 1e-6 and len(calls) == 1


@needs_onednn
@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.ones(4, 5), torch.ones(5, 6)),  # small
        (torch.ones(0, 900), torch.ones(900, 900)),
        (torch.ones(900, 0), torch.ones(0, 900)),
        (torch.ones(90, 90, dtype=torch.float64), torch.ones(90, 90, dtype=torch.float64)),
        (torch.ones(90, 90, dtype=torch.int64), torch.ones(90, 90, dtype=torch.int64)),
        (torch.ones(90, 90, dtype=torch.bfloat16), torch.ones(90, 90, dtype=torch.bfloat16)),
    ],
)
def test_other_products_stay_with_torch(a: Tensor, b: Tensor, calls: list[Tensor]) -> None:
    expected = torch.mm(a, b)
    assert torch.equal(product(a, b), expected) and product(a, b).dtype == expected.dtype
    assert not calls
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        product(torch.ones(90, 90), torch.ones(91, 90))


@needs_onednn
def test_a_user_who_switches_onednn_off_gets_torchs_own(calls: list[Tensor]) -> None:
    a = torch.ones(90, 90)
    assert a.numel() * 90 > SMALLEST
    with torch.backends.mkldnn.flags(enabled=False):
        product(a, a)
    assert not calls
    product(a, a)
    assert len(calls) == 1


@needs_onednn
@pytest.mark.skipif(not is_faster(), reason="for AMD processors with AVX-512")
def test_the_gradient_of_a_product_goes_through_it_too(calls: list[Tensor]) -> None:
    assert cpu_products.use_onednn() is not None
    x, w = torch.randn(3, 40, 640), torch.randn(512, 640, requires_grad=True)
    small = torch.randn(3, 5, requires_grad=True)
    torch.nn.functional.linear(x, w).square().sum().backward()
    (small @ small.t()).sum().backward()
    assert len(calls) == 2 and w.grad is not None
    wide = w.detach().double().requires_grad_()
    torch.nn.functional.linear(x.double(), wide).square().sum().backward()
    assert wide.grad is not None
    torch.testing.assert_close(w.grad.double(), wide.grad, rtol=1e-4, atol=1e-2)
    assert small.grad is not None and small.grad.shape == (3, 5)


@pytest.mark.parametrize("maker", ["AuthenticAMD", "GenuineIntel"])
def test_only_amd_processors_with_avx512_are_chosen(
    maker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nvendor_id : {maker}\n", encoding="utf-8")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for capability in ("AVX512", "AVX2"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        assert is_faster(cpuinfo) == (maker == "AuthenticAMD" and capability == "AVX512")
    assert not is_faster(tmp_path / "nowhere")
