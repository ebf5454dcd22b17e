"""Every kernel fits the cards that it is chosen on: shared memory, registers, spills."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from kernel_resources import MODELS, SHARED, Resources, config_of, main, parsed, resources_of

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "kernel-resources.jsonl"
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs triton's compiler",
)
FITS = Resources(86, "llama-3.1-8b", "rotate", "3.7.1", 4, 255, 0, 99 * 1024)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Triton has compiled for these tests: a kernel that models share is compiled once."""
    return tmp_path_factory.mktemp("compiled")


@needs_compiler
@pytest.mark.parametrize(
    ("card", "model"),
    [
        (86, "qwen3-8b"),
        *(
            pytest.param(card, model, marks=pytest.mark.thorough)
            for card in SHARED
            for model in MODELS
            if (card, model) != (86, "qwen3-8b")
        ),
    ],
)
def test_a_models_kernels_fit_a_card(
    card: int, model: str, monkeypatch: pytest.MonkeyPatch, compiled: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(compiled))
    found = resources_of(card, model)
    assert [one.excess for one in found if one.excess] == []
    names = {one.kernel for one in found}
    assert names >= {"dequantise", "add_norm", "norm_backward", "cross_entropy", "move"}
    hopper_only = {"forward_kernel", "queries_kernel", "keys_kernel"}
    assert bool(names & hopper_only) == (card == 90 and config_of(model).head_dim in (64, 128))


def test_the_committed_table_is_whole_and_within_the_limits() -> None:
    found = [Resources(**json.loads(line)) for line in RESULTS.read_text("utf-8").splitlines()]
    assert {(one.card, one.model) for one in found} == {(c, m) for c in SHARED for m in MODELS}
    assert [one.excess for one in found if one.excess] == []


def test_what_is_beyond_a_card_is_named() -> None:
    assert FITS.excess == ""
    assert "101377 bytes of shared memory" in replace(FITS, shared=99 * 1024 + 1).excess
    assert replace(FITS, card=80, shared=163 * 1024).excess == ""
    assert "256 registers" in replace(FITS, registers=256).excess
    assert replace(FITS, spilled=64).excess == ""
    assert replace(FITS, spilled=72).excess == "72 bytes spilled"


def test_another_form_of_cuobjdumps_report_is_refused() -> None:
    line = " Function _move:\n  REG:63 STACK:8 SHARED:16 LOCAL:4 CONSTANT[0]:944 TEXTURE:0"
    assert parsed(line) == (63, 12)
    with pytest.raises(ValueError, match="nothing that is known: 'REGISTERS 63'"):
        parsed("REGISTERS 63")
    with pytest.raises(ValueError, match="unknown"):
        config_of("no-such-model")


@needs_compiler
def test_the_script_fails_beyond_a_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import kernel_resources

    beyond = replace(FITS, shared=SHARED[86] + 1)
    monkeypatch.setattr(kernel_resources, "resources_of", lambda *_: [FITS, beyond])
    out = tmp_path / "out.jsonl"
    assert main(["--cards", "86", "--models", "llama-3.1-8b", "--out", str(out)]) == 1
    assert len(out.read_text(encoding="utf-8").splitlines()) == 2
    assert "bytes of shared memory" in capsys.readouterr().out
