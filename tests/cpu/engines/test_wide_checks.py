"""The checks of tests/gpu/test_wide.py, tried with a small limit, and with faults."""

from __future__ import annotations

import importlib.util

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which has no build here"
)
CPU = torch.device("cpu")


def test_sound_kernels_pass():
    from wide import ROUNDED, attention_check, places_check, product_check

    found = places_check(1 << 12, CPU, width=64, suffix="reference")
    assert len(found) == 7 and max(found.values()) < ROUNDED
    assert product_check(1 << 12, CPU, width=64) < ROUNDED
    for beyond in (-3, 3):
        made = attention_check("reference", 1 << 13, beyond, CPU, width=160, size=16)
        assert len(made) == 8 and max(made.values()) < 2 * ROUNDED


@pytest.mark.parametrize("name", ["norm.add_norm", "rotary.rotate", "swiglu.swiglu_backward"])
def test_a_kernel_that_leaves_out_the_rows_beyond_the_limit_is_seen(monkeypatch, name):
    import wide

    module, _, function = name.partition(".")
    genuine = getattr(getattr(wide, module), f"{function}_reference")
    limit, width = 1 << 12, 64

    def wrapped(*given, **more):
        before = [t.clone() if isinstance(t, torch.Tensor) else t for t in given]
        result = genuine(*given, **more)
        for t, old in zip(given, before, strict=True):
            if isinstance(t, torch.Tensor) and t.dim() == 2:
                t[limit // width :] = old[limit // width :]
        return result

    monkeypatch.setattr(getattr(wide, module), f"{function}_reference", wrapped)
    found = wide.places_check(limit, CPU, width=width, suffix="reference")
    assert [one for one, far in found.items() if not far < wide.ROUNDED] == [name]


def test_attention_that_forgets_the_last_rows_is_seen(monkeypatch):
    import wide

    genuine = wide.a.attention

    def forgets(q, k, v, bounds):
        kept = genuine(q, k, v, bounds)
        if q.stride(0) > 16 * 8:  # a view of the wide matrix
            kept.out[-1:] = 0
        return kept

    monkeypatch.setattr(wide.a, "attention", forgets)
    found = wide.attention_check("reference", 1 << 13, 3, CPU, width=160, size=16)
    bad = [name for name, far in found.items() if not far < 2 * wide.ROUNDED]
    assert bad == ["views, out", "views, out, last rows"]
