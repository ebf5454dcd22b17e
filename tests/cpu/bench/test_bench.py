"""The benchmark: drawn weights, FLOPs, cards, matrix, checks, tables."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from glassloop.base import random as random_base
from glassloop.base.hashing import base_hash
from glassloop.base.quantised import load_base
from glassloop.base.source import resolve_source
from glassloop.base.tokenizer import load_tokenizer
from glassloop.bench.sums import Tokens, energy_of, spread, utilisation
from glassloop.bench.workloads import workload
from glassloop.config import LoraConfig, ModelConfig
from glassloop.data.batches import build_pass
from glassloop.data.rows import Row
from glassloop.engines.build import build_engine
from glassloop.predict.flops import flops_of
from glassloop.predict.shapes import KNOWN

CPU = torch.device("cpu")
EXPECTED_WEIGHTS = [
    -0.01513671875,
    0.28515625,
    0.058349609375,
    -0.042236328125,
]  # the first of "0.q_proj", hidden 64: on any device
TINY = KNOWN["random:tiny"]
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def load(model: str, cache_dir: Path, *, precision: str = "bf16", **fields: object):
    config = ModelConfig(id=model, cache_dir=str(cache_dir), **fields)  # type: ignore[arg-type]
    return load_base(config, precision=precision, device=CPU, first=contextlib.nullcontext)


# --- models with drawn weights


def test_drawn_nf4_base_is_what_transformers_makes_of_the_same_weights(tmp_path: Path) -> None:
    drawn, report = load("random:tiny", tmp_path)
    plain, _ = load("random:tiny", tmp_path, quantization="none")
    plain.save_pretrained(tmp_path / "files")
    _, read = load(str(tmp_path / "files"), tmp_path)
    assert report.checksum == read.checksum
    assert type(drawn.model.layers[1].mlp.down_proj).__name__ == "Linear4bit"
    _, second = load("random:tiny", tmp_path)
    assert second.from_cache and second.checksum == report.checksum


def test_drawn_weights_are_the_same_bits_everywhere_and_about_normal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = random_base.drawn("0.q_proj", (256, 64), 64, CPU)
    assert weight.flatten()[:4].tolist() == EXPECTED_WEIGHTS
    assert weight.dtype == torch.bfloat16
    assert weight.float().std().item() == pytest.approx(0.16, rel=0.02)
    assert abs(weight.float().mean().item()) < 0.005
    monkeypatch.setattr(random_base, "CHUNK", 100)
    assert torch.equal(random_base.drawn("0.q_proj", (256, 64), 64, CPU), weight)
    other = random_base.drawn("1.q_proj", (256, 64), 64, CPU)
    assert (
        abs(torch.corrcoef(torch.stack([weight.flatten(), other.flatten()]).float())[0, 1].item())
        < 0.03
    )


def test_drawn_base_is_known_by_name_and_has_a_tokenizer_of_its_vocabulary(tmp_path: Path) -> None:
    config = ModelConfig(id="random:tiny", cache_dir=str(tmp_path))
    tokenizer = load_tokenizer(config)
    assert len(tokenizer) == TINY.vocabulary
    assert tokenizer.decode(tokenizer.encode("Grüße, 12 §")) == "Grüße, 12 §"
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}) == 3
    source = resolve_source(config)
    assert base_hash(source, tmp_path / "memo") == base_hash(
        replace(source, folder=None), tmp_path / "memo"
    )
    assert "drawn" in source.note
    with pytest.raises(
        ValueError, match=r"random:llama-9b is unknown: there are random:llama-8b, random:llama-70b"
    ):
        resolve_source(ModelConfig(id="random:llama-9b", cache_dir=str(tmp_path)))


# --- FLOPs


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("targets", [SEVEN, ("down_proj",), ("k_proj", "down_proj")])
def test_flops_are_those_that_torch_counts(
    tmp_path: Path, checkpointing: bool, targets: tuple[str, ...]
) -> None:
    # eager attention: torch counts no other on a CPU. It computes all places of a row.
    model = ModelConfig(
        id="random:tiny", quantization="none", attention="eager", cache_dir=str(tmp_path)
    )
    engine = build_engine(
        model,
        LoraConfig(r=4, alpha=8, targets=targets),
        precision="fp32",
        checkpointing=checkpointing,
        seed=0,
        device=CPU,
        first=contextlib.nullcontext,
    )
    rows = [Row(str(i), tuple(range(10, 74)), (False,) * 20 + (True,) * 44) for i in range(2)]
    p = build_pass(rows, packed=False, pad_id=3, device=CPU)
    with FlopCounterMode(display=False) as counter:
        engine(p)[0].backward()
    counted = flops_of(
        TINY, [(64, 44)] * 2, r=4, targets=targets, checkpointing=checkpointing, causal=False
    )
    assert counted.model + counted.recompute == pytest.approx(counter.get_total_flops(), rel=0.01)
    if not checkpointing:
        assert counted.model == counter.get_total_flops() and counted.recompute == 0


def test_flops_of_the_8b_shape_are_the_ones_done_by_hand() -> None:
    per_token = flops_of(
        KNOWN["random:llama-8b"], [(2048, 2048)], r=16, targets=SEVEN, checkpointing=True
    )
    # 4 x 6.98 G weights, less 0.05 of the first layer; 4 x 0.525 G of the head; 6 x 42 M of
    # adapters
    assert per_token.linear / 2048 / 1e9 == pytest.approx(4 * 6.9793 - 0.0503, rel=1e-3)
    assert per_token.head / 2048 / 1e9 == pytest.approx(2.101, rel=1e-3)
    assert per_token.adapters / 2048 / 1e9 == pytest.approx(6 * 0.041943, rel=1e-2)
    assert per_token.attention / 2048 / 1e9 == pytest.approx(
        3 * 32 * 4 * 1024.5 * 4096 / 1e9, rel=1e-6
    )
    half = flops_of(
        KNOWN["random:llama-8b"], [(2048, 1024)], r=16, targets=SEVEN, checkpointing=False
    )
    assert half.head == per_token.head / 2 and half.linear == per_token.linear


# --- sums


def test_rates_and_spread_say_of_what() -> None:
    assert Tokens(100, 80, 120).per_s(2.0) == {"real": 50.0, "supervised": 40.0, "slot": 60.0}
    assert Tokens(100, 80, 120).per_s(2.0, 2)["real"] == 25.0
    assert spread([3.0, 1.0, 2.0]) == {
        "median": 2.0,
        "p10": 1.2,
        "p90": 2.8,
        "all": [3.0, 1.0, 2.0],
    }
    assert spread([3.0])["p90"] == 3.0


def test_utilisation_tells_needed_from_executed() -> None:
    rows = workload("scam-v1", 4, vocabulary=512)
    how: dict[str, Any] = dict(r=4, targets=SEVEN, checkpointing=True, seconds=2.0, ceiling=1e9)
    literal = utilisation(TINY, [rows[:2], rows[2:]], packed=False, ranks=1, **how)
    packed = utilisation(TINY, [rows], packed=True, ranks=1, **how)
    assert literal["mfu"] == packed["mfu"] and literal["hfu"] > packed["hfu"] > packed["mfu"]
    assert utilisation(TINY, [rows], packed=True, ranks=2, **how)["mfu"] == pytest.approx(
        packed["mfu"] / 2
    )
    assert utilisation(TINY, [rows], packed=True, ranks=1, **how | {"ceiling": None})["mfu"] is None


def test_energy_is_the_counters_else_the_mean_power_else_nothing() -> None:
    assert energy_of([100.0, 200.0], None, 2.0, 600) == {
        "joules": 300.0,
        "how": "NVML's energy counter",
        "tokens_per_joule": 2.0,
    }
    told = energy_of([None, None], {"power_w": 50.0}, 2.0, 600)
    assert told is not None and told["joules"] == 200.0 and "mean power" in told["how"]
    assert energy_of([None], None, 2.0, 600) is None
    assert energy_of([None], {"power_w": None}, 2.0, 600) is None
