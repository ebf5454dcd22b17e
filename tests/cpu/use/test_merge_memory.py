"""The table of a merge has one model on the card at a time."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from glassloop.use.merge import job


def test_the_quantised_model_is_freed_before_a_merged_one_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    hf = SimpleNamespace(get_base_model=lambda: None, disable_adapter=nullcontext)
    loaded = SimpleNamespace(hf=hf, device=None, autocast=None)
    monkeypatch.setattr(job, "load", lambda *_: loaded)
    monkeypatch.setattr(job, "look", lambda *_: told.append("looked"))
    monkeypatch.setattr(job, "line", lambda *_: "a line")
    monkeypatch.setattr(job, "free_dropped", lambda _: told.append("freed"))
    merge: Any = SimpleNamespace(
        trained=None,
        trained_on="NF4",
        quantised=False,
        device=torch.device("cpu"),
        rows=SimpleNamespace(rows=[1]),
        given=SimpleNamespace(base="original"),
        line=lambda *_: "a line",
        seen=lambda _: told.append("merged"),
    )
    assert job.Job.table(merge, Path(), Path()) == ["a line"] * 3
    assert told == ["looked", "looked", "freed", "merged"]
