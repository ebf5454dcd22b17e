"""Ranks and scales by layer: lora.rank_pattern and lora.alpha_pattern, in PEFT's sense."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family_models import adapters_of, fused_of, gradient, passes
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from glassloop.cli.plan import main as plan
from glassloop.config import LoraConfig
from glassloop.config.arguments import ConfigError, from_values, parse
from glassloop.config.lora import matches
from glassloop.use.merge.merge import merged, pairs_of
from glassloop.use.trained import adapter_weights, open_trained
from train_loop import train, update_once

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the fused engine needs triton"
)
# Ranks that differ within q, k, v and between layers; one beyond the multiple of 16, and r = 1.
PATTERNS = {
    "rank_pattern": (
        *("layers.0.self_attn.q_proj=19", "k_proj=1"),
        *(r"layers\.1.*up_proj=23", "layers.1.mlp.down_proj=30"),
    ),
    "alpha_pattern": ("v_proj=2.5", "layers.1.self_attn.k_proj=24"),
}
LORA = LoraConfig(r=4, alpha=8, **PATTERNS)


def test_command_line_and_yaml_say_the_same() -> None:
    words = ["lora.rank_pattern.layers.0.self_attn.q_proj=8", "--lora.rank_pattern.k_proj=2"]
    one = parse([*words, "lora.alpha_pattern.v_proj=2.5"]).lora
    ranks = {"layers.0.self_attn.q_proj": 8, "k_proj": 2}
    two = from_values({"lora": {"rank_pattern": ranks, "alpha_pattern": {"v_proj": 2.5}}}).lora
    assert one == two and one.ranks == ranks and one.alphas == {"v_proj": 2.5}
    assert one.most_rank == 16 and one.rank_of("model.layers.10.self_attn.q_proj") == 16
    assert one.rank_of("model.layers.0.self_attn.q_proj") == 8
    assert one.scale_of("model.layers.3.self_attn.k_proj") == 8
    assert one.scale_of("model.layers.3.self_attn.v_proj") == 2.5 / 16


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("q_proj", "write NAME=RANK"),
        ("q_proj=two", "'two' is no number"),
        ("q_proj=0", "give a whole number from 1 to 1024"),
        ("q_proj=2.5", "give a whole number"),
        ("q_proj=nan", "give a whole number"),
        ("(a|a)*b=2", "a name may have letters"),
        (".*.*.*q=2", "at most 2 of"),
        ("q[=2", "is no pattern"),
        ("(?:q)=2", "a name may have letters"),
    ],
)
def test_a_pattern_that_cannot_be_is_refused_by_field(pattern: str, said: str) -> None:
    with pytest.raises(ConfigError, match=r"lora\.rank_pattern") as error:
        from_values({"lora": {"rank_pattern": [pattern]}})
    assert said in str(error.value)


def test_twice_one_name_and_an_alpha_of_0_are_refused() -> None:
    with pytest.raises(ConfigError, match="once a name"):
        parse(["lora.rank_pattern.q_proj=1", "lora.rank_pattern.q_proj=2"])
    for alpha in ("0", "inf", "nan"):
        with pytest.raises(ConfigError, match=r"lora\.alpha_pattern\.q_proj = .*above 0"):
            parse([f"lora.alpha_pattern.q_proj={alpha}"])
    with pytest.raises(ConfigError, match=r"unsloth and lora\.rank_pattern = q_proj=1"):
        parse(["lora.rank_pattern.q_proj=1", "execution.engine=unsloth"])


def test_a_pattern_without_a_layer_is_refused(engine_of, tiny_llama: Path) -> None:
    lora = LoraConfig(r=4, alpha=8, targets=("q_proj",), alpha_pattern=("k_proj=2",))
    with pytest.raises(ValueError, match=r"lora\.alpha_pattern\.k_proj names no layer that gets"):
        engine_of(tiny_llama, lora=lora)


@needs_triton
def test_fused_computes_what_peft_computes_and_the_config_says_its_ranks(
    engine_of, tiny_llama: Path
) -> None:
    engine = engine_of(tiny_llama, lora=LORA, quantization="nf4")
    adapters = adapters_of(engine)
    for name, place in adapters.slices.items():
        layer = name.removeprefix("base_model.model.").partition(".lora_")[0]
        side = 0 if ".lora_A." in name else 1
        assert place.shape[side] == LORA.rank_of(layer), name
        module = engine.hf.get_base_model().get_submodule(layer)
        assert module.scaling["default"] == LORA.scale_of(layer)
    assert {place.shape[0] for n, place in adapters.slices.items() if ".lora_A." in n} == {
        *(4, 19, 1, 23, 30)
    }
    wanted, slope = gradient(engine, adapters, passes(packed=False))
    for packed in (True, False):
        found, ours = gradient(fused_of(engine), adapters, passes(packed=packed))
        assert found == pytest.approx(wanted, rel=1e-5)
        for matrix, place in adapters.slices.items():
            far = float((place.of(ours) - place.of(slope)).norm())
            assert far <= 1e-5 * float(place.of(slope).norm()), f"{matrix}: off by {far:g}"


@needs_triton
@pytest.mark.parametrize("tiers", ["host", "chunk", "held"])
def test_fused_s_ways_to_save_memory_know_every_layer_s_rank(
    engine_of, tiny_llama: Path, tiers: str
) -> None:
    from glassloop.engines.fused.parts import largest
    from glassloop.predict.tiers import Tiers, scratch_bytes

    how = {"host": Tiers(0, "all"), "chunk": Tiers(0, "all", chunk=7), "held": Tiers(1, held=2)}
    engine = engine_of(tiny_llama, lora=LORA, quantization="nf4")
    adapters = adapters_of(engine)
    wanted, slope = gradient(engine, adapters, passes(packed=False))
    fused = fused_of(engine)
    fused.use_tiers(how[tiers])
    found, ours = gradient(fused, adapters, passes(packed=True))
    assert found == pytest.approx(wanted, rel=1e-5)
    assert float((ours - slope).norm() / slope.norm()) < 1e-5
    if tiers != "held":
        assert fused.scratch.bytes == scratch_bytes(largest(fused.layers))  # one matrix a group


@needs_triton
def test_the_check_of_a_run_holds_them_to_peft(engine_of, tiny_llama: Path) -> None:
    from family_models import rows_of

    from glassloop.engines.fused import proof

    engine = engine_of(tiny_llama, lora=LORA, quantization="nf4")
    adapters, rows = adapters_of(engine), rows_of((13, 4, 21, 1))
    right, wrong = fused_of(engine), fused_of(engine)
    assert proof.disagreement(right, adapters, rows, packed=True, pad_id=0) == ""
    qkv = wrong.layers[1].qkv
    qkv.adapters = tuple(replace(one, scaling=2.0) for one in qkv.adapters)
    assert "layers.1.self_attn" in proof.disagreement(wrong, adapters, rows, packed=True, pad_id=0)


def test_a_run_counts_says_records_and_saves_them(run_of, tiny_llama: Path, tmp_path) -> None:
    run = run_of(lora=LORA.model_dump(), execution={"precision": "fp32"})
    shapes = {n: s.shape for n, s in run.replica.adapters.slices.items()}
    assert run.contract.facts["trainable parameters"] == sum(a * b for a, b in shapes.values())
    assert any("but r = 19 in layers.0.self_attn.q_proj" in line for line in run.header)
    run.begin()
    assert update_once(run, 1) is not None
    run.close()
    engine = run.replica.plain_engine
    engine.hf.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["rank_pattern"] == LORA.ranks and saved["alpha_pattern"] == LORA.alphas
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    stranger = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    theirs = {n: p for n, p in stranger.named_parameters() if "lora_" in n}
    assert {n: tuple(p.shape) for n, p in theirs.items()} == shapes


@pytest.mark.parametrize("other", [{"rank_pattern": ()}, {"alpha_pattern": ("v_proj=3",)}])
def test_an_adapter_to_begin_from_must_have_the_same(
    engine_of, tiny_llama: Path, tmp_path: Path, other: dict
) -> None:
    engine_of(tiny_llama, lora=LORA).hf.save_pretrained(tmp_path, save_embedding_layers=False)
    engine_of(tiny_llama, lora=LORA, init_adapter=str(tmp_path))
    changed = LORA.model_copy(update=other)
    with pytest.raises(ValueError, match=rf"lora\.{next(iter(other))} is .* in the adapter"):
        engine_of(tiny_llama, lora=changed, init_adapter=str(tmp_path))


def test_patterns_match_as_peft_s_do() -> None:
    from peft.utils.other import get_pattern_key

    layer = "model.layers.11.self_attn.q_proj"
    for pattern in ("q_proj", "proj", "layers.11.self_attn.q_proj", "1.self_attn.q_proj", r".*q.*"):
        assert matches(pattern, layer) == (get_pattern_key([pattern], layer) == pattern), pattern


def test_the_plan_counts_every_layer_s_rank(capsys: pytest.CaptureFixture[str]) -> None:
    """random:tiny has 2 layers: q_proj is 64 -> 64, k_proj 64 -> 32."""
    words = ["model.id=random:tiny", "lora.targets=q_proj,k_proj", "lora.r=4", "data.source=scam"]
    words += ["lora.rank_pattern.layers.0.self_attn.q_proj=19", "lora.rank_pattern.k_proj=1"]
    assert plan([*words, "--rows", "40"]) == 0
    said = capsys.readouterr().out
    assert f"{(19 + 4) * (64 + 64) + 2 * (64 + 32):,} parameters: r = 4 x (in + out)" in said
    assert "but r = 19 in layers.0.self_attn.q_proj, r = 1 in k_proj" in said


def test_a_checkpoint_resumes_and_merges_with_each_layer_s_scale(run_of, tmp_path: Path) -> None:
    run = run_of(
        lora=LORA.model_dump(),
        execution={"precision": "fp32"},
        schedule={"updates": 2, "warmup_updates": 0},
        checkpoint={"every_updates": 1},
        model={"quantization": "none"},
    )
    assert train(run) == 0
    trained = open_trained(run.folder)
    base = load_file(next(Path(run.config.model.id).glob("*.safetensors")))
    pairs = pairs_of(adapter_weights(trained), trained.config.lora)
    plain = AutoModelForCausalLM.from_pretrained(run.config.model.id, dtype=torch.float32)
    whole = PeftModel.from_pretrained(plain, str(trained.checkpoint)).merge_and_unload()
    state = whole.state_dict()
    assert len(pairs) == 14
    for name, pair in pairs.items():
        torch.testing.assert_close(state[name], merged(base[name], pair, torch.float32))
    assert not torch.equal(state[name], base[name].float())
