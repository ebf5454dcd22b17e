"""In bf16 no family's gradient is further from fp32 than the reference engine's."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from family_models import MODELS, bf16_distances

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton, which has no build for this system",
)


# A family's second model, its name with a comma, repeats the family.
FAMILIES = [
    pytest.param(name, marks=pytest.mark.thorough if "," in name else ())
    for name in MODELS
    if "longrope" not in name
]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_gradient_is_nearer_to_fp32(tmp_path, tiny_tokenizer, name):
    said, share = bf16_distances(name, tmp_path, tiny_tokenizer, torch.device("cpu"))
    assert said == "" and share <= 1.0  # 0.78 (phi3) to 0.92 (granite) were measured
