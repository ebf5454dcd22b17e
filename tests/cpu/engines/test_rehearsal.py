"""A rehearsal compiles the kernels that a run will launch.

It leaves no other trace. No card is needed: kernels are compiled for one that is not there, and
launching does nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import MODELS, saved_model

from glassloop.base.source import resolve_source
from glassloop.config import LoraConfig, ModelConfig
from glassloop.data.batches import build_pass
from glassloop.data.rows import Row
from glassloop.engines import build
from glassloop.engines.build import build_engine
from glassloop.predict.tiers import Tiers

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs triton's compiler",
)
KERNEL_MODULES = ("norm", "swiglu", "rotary", "loss", "matrices", "dequant")
WIDER = {"hidden_size": 128, "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}

# "phi3, longrope" has frequencies for another size of heads than WIDER's, and phi3's kernels.
FAMILIES = [name for name in MODELS if name not in ("llama", "phi3, longrope")]


@pytest.fixture(scope="module")
def compiled_here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, compiled_here: Path):
    """A Hopper card of a stub, and a Triton cache of these tests' own."""
    from absent_card import card

    monkeypatch.setenv("TRITON_CACHE_DIR", str(compiled_here))
    with card(90) as stub:
        yield stub


@pytest.fixture
def model_of(tmp_path: Path, tiny_tokenizer: Any) -> Callable[..., tuple[ModelConfig, LoraConfig]]:
    """A small model of a family, with heads that attention's own kernels take."""

    def made(name: str = "llama", **fields: Any) -> tuple[ModelConfig, LoraConfig]:
        folder, lora = saved_model(name, tmp_path / "model", tiny_tokenizer, **WIDER)
        return ModelConfig(id=str(folder), **fields), lora

    return made


def rehearsed(model: ModelConfig, lora: LoraConfig) -> Any:
    from transformers import AutoConfig

    from glassloop.engines.fused.rehearsal import Quantised, shapes

    config = AutoConfig.from_pretrained(model.id)
    return shapes(config, lora, torch.bfloat16, Quantised(model.double_quantization))


def launched_by_passes(
    model: ModelConfig, lora: LoraConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let an engine with real weights ask for its kernels, on tensors of the CPU.

    Rows of other lengths than the rehearsal's, packed and padded, kept and recomputed.
    """
    from glassloop.engines.fused import attention

    choose = attention.choose_kernel
    monkeypatch.setattr(
        attention, "choose_kernel", lambda rows, _, *rest: choose(rows, torch.device("meta"), *rest)
    )
    for name in KERNEL_MODULES:
        module = importlib.import_module(f"glassloop.engines.fused.{name}")
        monkeypatch.setattr(module, "by_kernels", lambda _: True)
    engine: Any = build_engine(
        model, lora, precision="bf16", checkpointing=True, seed=0, device=torch.device("cpu"),
        first=contextlib.nullcontext, engine="fused",
    )  # fmt: skip
    for parameter in engine.trained:
        parameter.grad = torch.zeros_like(parameter)
    rows = [Row(str(n), tuple(range(5, 5 + n)), (False, *(True,) * (n - 1))) for n in (33, 7, 40)]
    for packed, kept in ((True, 0), (False, 2), (True, 2)):
        engine.use_tiers(Tiers(kept, streamed=engine.tiers.streamed))
        p = build_pass(rows[: 1 + kept], packed=packed, pad_id=0, device=torch.device("cpu"))
        engine(p)[0].backward()


@pytest.mark.parametrize("double", [True, False])
def test_passes_launch_what_was_rehearsed_and_nothing_else(
    double: bool, card: Any, monkeypatch: pytest.MonkeyPatch, model_of: Any
) -> None:
    """Equal keys of every kernel. The vocabulary, 131, divides by nothing."""
    from absent_card import compiled, forget

    from glassloop.engines.fused.rehearsal import rehearse

    model, lora = model_of(double_quantization=double)
    rehearse(rehearsed(model, lora))
    foreseen = set(compiled())
    assert not card.launched, "a rehearsal launches nothing"
    forget()
    launched_by_passes(model, lora, monkeypatch)
    assert card.launched and {name for name, _ in foreseen} >= {"forward_kernel", "keys_kernel"}
    assert set(compiled()) == foreseen


@pytest.mark.thorough
@pytest.mark.parametrize("name", FAMILIES)
def test_every_familys_kernels_are_foreseen(
    name: str, card: Any, monkeypatch: pytest.MonkeyPatch, model_of: Any
) -> None:
    from absent_card import compiled, forget

    from glassloop.engines.fused.rehearsal import rehearse

    model, lora = model_of(name)
    rehearse(rehearsed(model, lora))
    foreseen = set(compiled())
    forget()
    launched_by_passes(model, lora, monkeypatch)
    assert set(compiled()) == foreseen


def test_a_rehearsal_changes_neither_random_numbers_nor_dtypes(card: Any, model_of: Any) -> None:
    """The same run must follow, bit for bit, as without it."""
    from glassloop.engines.fused.rehearsal import Rehearsal

    model, lora = model_of()
    states = torch.get_rng_state(), random.getstate(), torch.get_default_dtype()
    beside = Rehearsal(rehearsed(model, lora), torch.device("cpu"))
    assert beside.end() == "" and beside.seconds is not None
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), torch.get_default_dtype()) == states[1:]


def test_a_rehearsal_that_fails_says_so_and_stops_nothing(
    card: Any, monkeypatch: pytest.MonkeyPatch, model_of: Any
) -> None:
    from glassloop.engines.fused import rehearsal

    def fails(_: Any) -> None:
        raise RuntimeError("ptxas is missing\nand more")

    engine = rehearsed(*model_of())
    monkeypatch.setattr(rehearsal, "rehearse", fails)
    beside = rehearsal.Rehearsal(engine, torch.device("cpu"))
    assert beside.end() == "kernels compile at their first launch (RuntimeError: ptxas is missing)"


def test_a_base_is_loaded_while_kernels_compile(
    card: Any, monkeypatch: pytest.MonkeyPatch, model_of: Any
) -> None:
    """The rehearsal has begun when loading begins, and ends before the engine is built."""
    from glassloop.engines.fused import rehearsal

    model, lora = model_of()
    order: list[str] = []
    load = build._load

    compiles, loaded = threading.Event(), threading.Event()

    def slowly(_: Any) -> None:
        compiles.set()
        loaded.wait(20)
        order.append("compiled")

    def loads(*args: Any) -> Any:
        compiles.wait(5)
        order.append("loads" if compiles.is_set() else "loads alone")
        found = load(*args)
        loaded.set()
        return found

    begun = build._rehearsal
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(rehearsal, "rehearse", slowly)
    monkeypatch.setattr(build, "_load", loads)
    monkeypatch.setattr(
        build, "_rehearsal", lambda m, lora, p, _, s: begun(m, lora, p, torch.device("cuda"), s)
    )
    source = resolve_source(model)
    built = build_engine(
        model, lora, precision="bf16", checkpointing=True, seed=0, device=torch.device("cpu"),
        first=contextlib.nullcontext, engine="fused", source=source,
    )  # fmt: skip
    assert built.name == "fused" and order == ["loads", "compiled"]
