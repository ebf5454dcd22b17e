"""benchmarks/families.py builds, checks and times a model; here a small one on the CPU."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from glassloop.base.reading import prepare_4bit


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


@pytest.mark.parametrize("name", ["llama-3.2-3b", "gemma-3-12b", "phi-4"])
def test_the_folder_for_unsloth_holds_the_model_that_was_drawn(name: str, tmp_path: Path) -> None:
    """A tied head is among them."""
    import families_drawn

    drawn = families_drawn.drawn_model(name, torch.device("cpu"), 1, True)
    families_drawn.save_base(drawn, tmp_path / "base")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    prepare_4bit(read, torch.float32)
    ids = torch.arange(3, 40).unsqueeze(0)
    assert torch.allclose(read(ids).logits, drawn(ids).logits, atol=1e-5)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "base")) > 0


@pytest.mark.skipif(find_spec("unsloth") is not None, reason="unsloth is installed here")
def test_without_unsloth_the_line_says_why(tmp_path: Path, capsys) -> None:
    import families

    lines: list[dict[str, Any]] = []
    say = lambda **line: lines.append(line)  # noqa: E731
    fields = dict(unsloth_python=sys.executable, unsloth_batch=2, unsloth_timeout=60.0)
    asked = argparse.Namespace(tokens=2048, passes=1, **fields)
    facts = dict(targets=["q_proj"], vocabulary=1024, device="cpu")
    theirs = families.beside_unsloth("phi-4", tmp_path / "base", facts, asked, say)
    why = "the package unsloth is not installed"
    assert lines == [{"kind": "unsloth", "model": "phi-4", "absent": why}]
    assert not families.installed(sys.executable)
    families.ratios("phi-4", [{"rows": "full", "kernel": "chosen"}], theirs, say)
    assert len(lines) == 1
    given = json.loads((tmp_path / "asked.json").read_text())
    rows = [row for batch in given["batches"]["scam"] for row in batch]
    assert len(rows) > 1 and sum(map(len, rows)) <= 2048
    assert all(len(batch) <= 2 for batch in given["batches"]["scam"])


def test_a_ratio_sets_the_chosen_kernel_beside_unsloth() -> None:
    import families

    lines: list[dict[str, Any]] = []
    ours = [
        {"rows": "full", "kernel": kernel, "tokens_a_s": rate, "gib": 9.0}
        for kernel, rate in (("chosen", 300.0), ("triton", 900.0))
    ]
    theirs = [{"rows": "full", "tokens_a_s": 200.0, "gib": 7.0}, {"absent": "no"}]
    families.ratios("m", ours, theirs, lambda **line: lines.append(line))
    wanted = {"kind": "ratio", "model": "m", "rows": "full", "times": 1.5}
    assert lines == [wanted | {"gib": 9.0, "unsloth_gib": 7.0}]
