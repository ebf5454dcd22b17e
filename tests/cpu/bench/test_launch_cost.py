"""What a launch costs the host is measured without a card."""

from __future__ import annotations

import importlib.util
import json
import os

import pytest
import torch
from launch_cost import key_of, main

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs triton's compiler",
)


def test_the_kernel_alone_costs_less_than_by_tritons_launcher(
    monkeypatch: pytest.MonkeyPatch, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert main(["--repeats", "50"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["kernel_us"] < found["triton_us"] and found["key_us"] > 0


def test_the_key_tells_apart_what_triton_does() -> None:
    whole = torch.zeros(64, dtype=torch.bfloat16)
    keys = [key_of((one,)) for one in (whole, whole[1:], whole.float(), 1, 2, 32, 1.0)]
    assert len(set(keys)) == len(keys)
    assert key_of((whole[8:], 48, 2.5)) == key_of((whole, 32, 0.5))
