"""A card that is too full or lost is no fault of the fast engine."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from glassloop.loop import proving

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton, which has no build for this system",
)


def proven(monkeypatch: pytest.MonkeyPatch, error: Exception, asked: str = "auto") -> Any:
    """What `proven` returns if the check of the engine ends with this error."""
    from glassloop.engines.fused import proof

    def fails(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(proof, "disagreement", fails)
    execution = SimpleNamespace(layout="packed", engine=asked, checkpointing=False)
    engine = SimpleNamespace(name="fused", hf=torch.nn.Linear(1, 1), report=None)
    config = SimpleNamespace(execution=execution)
    return proving.proven(config, engine, None, (), 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("asked", ["auto", "fused"])
@pytest.mark.parametrize(
    ("error", "cure"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), r"memory\.profile=min$"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), r"memory\.profile=min$"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "glassloop doctor"),
    ],
)
def test_an_error_of_the_card_is_named_and_no_other_engine_is_taken(
    monkeypatch: pytest.MonkeyPatch, asked: str, error: Exception, cure: str
) -> None:
    """The reference needs more memory, and a lost card computes nothing."""
    with pytest.raises(ValueError, match=f"^rank 0, before update 1: .*{cure}") as raised:
        proven(monkeypatch, error, asked)
    assert "set execution.engine=peft, and please report" not in str(raised.value)


def test_a_kernel_that_does_not_compile_leaves_the_run_to_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = RuntimeError("out of resource: shared memory, Required: 250000")
    monkeypatch.setattr(proving, "PeftEngine", lambda hf, report: hf)
    _, choice = proven(monkeypatch, error)
    assert choice.engine == "peft" and "out of resource" in choice.why
    with pytest.raises(ValueError, match=r"set execution\.engine=peft, and please report"):
        proven(monkeypatch, error, "fused")
