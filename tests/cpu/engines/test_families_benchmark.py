"""benchmarks/families.py builds, checks and times a model; here a small one on the CPU."""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

import pytest
import torch


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the engine needs triton")
def test_a_model_has_a_line_for_its_check_and_for_both_kinds_of_rows() -> None:
    import families

    asked = argparse.Namespace(layers=1, small=True, tokens=2048, passes=1, profile="fill")
    lines: list[dict[str, Any]] = []
    for name in ("gemma-3-12b", "phi-4"):
        families.measure(name, asked, torch.device("cpu"), lambda **line: lines.append(line))
    assert [one["kind"] for one in lines] == ["built", "proof", "measured", "measured"] * 2
    assert all(one["differs"] == "" for one in lines if one["kind"] == "proof")
    measured = [one for one in lines if one["kind"] == "measured"]
    assert [one["rows"] for one in measured] == ["full", "scam"] * 2
    assert all(one["norm"] > 0 and one["tokens_a_s"] > 0 for one in measured)
    assert measured[0]["tokens"] == 2048 and measured[1]["tokens"] <= 2048
