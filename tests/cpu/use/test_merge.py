"""`glassloop merge`: the sum in fp32, NF4, shards, loaders, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from trained_runs import copy_of, prompt_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from glassloop.cli.__main__ import main
from glassloop.config import LoraConfig
from glassloop.use.loaded import load
from glassloop.use.merge.merge import AdapterPair, merged, pairs_of, shards_of
from glassloop.use.merge.weights import Weights
from glassloop.use.trained import adapter_weights, load_tokenizer_of, open_trained, template_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def outputs(run, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("merged")
    for base in ("original", "dequantised"):
        assert (
            main(
                [
                    "merge",
                    str(run),
                    str(folder / base),
                    "--base",
                    base,
                    "--no-table",
                    "--shard-gib",
                    "0.0001",
                ]
            )
            == 0
        )
    return {path.name: path for path in folder.iterdir()}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def test_the_sum_is_rounded_once():
    drawn = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=drawn).bfloat16()
    pair = AdapterPair(
        torch.randn(4, 64, generator=drawn), 0.01 * torch.randn(96, 4, generator=drawn), 2.0
    )
    exact = weight.double() + 2 * pair.b.double() @ pair.a.double()
    once = merged(weight, pair, torch.bfloat16)
    off = (once.double() - exact).abs()
    half_step = torch.maximum(exact.abs() * 2.0**-8, torch.tensor(1e-30, dtype=torch.float64))
    assert (off <= half_step * 1.001).all()
    twice = weight + (2 * pair.b @ pair.a).bfloat16()
    assert off.mean() < (twice.double() - exact).abs().mean()


def test_original_is_the_bases_own_weight_plus_the_adapter(run, outputs, tiny_llama):
    trained = open_trained(run)
    base, found = load_file(next(tiny_llama.glob("*.safetensors"))), tensors_of(outputs["original"])
    pairs = pairs_of(adapter_weights(trained), trained.config.lora)
    assert len(pairs) == 14 and found.keys() == base.keys()
    for name, tensor in base.items():
        wanted = tensor
        if name in pairs:
            wanted = (
                (tensor.double() + 2 * pairs[name].b.double() @ pairs[name].a.double())
                .float()
                .bfloat16()
            )
            assert not torch.equal(found[name], tensor)
        torch.testing.assert_close(found[name], wanted, rtol=2**-7, atol=0)
        assert (found[name] != wanted).float().mean() < 0.01  # fp32's own rounding, at ties


def test_dequantised_is_bit_for_bit_what_training_computed_with(run, outputs):
    trained = open_trained(run)
    loaded = load(trained, CPU)
    copy = Weights(Path(loaded.engine.report.folder or ""), torch.float32)
    pairs, found = (
        pairs_of(adapter_weights(trained), trained.config.lora),
        tensors_of(outputs["dequantised"]),
    )
    checked = 0
    for name, module in loaded.hf.get_base_model().named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight: Any = module.weight
            seen = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).to(
                torch.float32
            )
            plain = name.replace(".base_layer", "") + ".weight"
            assert torch.equal(copy.get(plain), seen)
            assert torch.equal(found[plain], merged(seen, pairs[plain], torch.bfloat16))
            checked += 1
    assert checked == 14


def test_each_shard_holds_what_fits_and_the_index_names_all(outputs, tiny_llama):
    out = outputs["original"]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and files == sorted(path.name for path in out.glob("*.safetensors"))
    assert index["weight_map"].keys() == tensors_of(tiny_llama).keys()
    most = int(0.0001 * 2**30)
    for shard in shards_of(Weights(tiny_llama), most):
        assert shard.bytes <= most or len(shard.names) == 1


def test_others_load_it_and_it_says_what_the_adapter_says(run, outputs):
    trained = open_trained(run)
    tokenizer, loaded = load_tokenizer_of(trained), load(trained, CPU)
    ids = torch.tensor(
        [prompt_of(template_of(trained, tokenizer), "Who calls, and what is asked for?")]
    )
    with torch.no_grad():
        adapter = loaded.hf(input_ids=ids).logits
        close = AutoModelForCausalLM.from_pretrained(outputs["dequantised"], dtype=torch.float32)(
            input_ids=ids
        ).logits
        without = AutoModelForCausalLM.from_pretrained(outputs["dequantised"], dtype=torch.float32)
        base = load(trained, CPU).hf
        with base.disable_adapter():
            base = base(input_ids=ids).logits
    assert (close - adapter).norm() < 0.02 * (base - adapter).norm() + 0.02 * adapter.norm()
    assert without.config.dtype in (torch.float32, "float32") and not hasattr(
        without.config, "quantization_config"
    )
    config = json.loads((outputs["original"] / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    again = AutoTokenizer.from_pretrained(outputs["original"])
    assert again.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
    ) == prompt_of(template_of(trained, tokenizer), "hi")


def test_the_checkpoint_itself_loads_in_peft_on_the_plain_base(run, tiny_llama):
    trained = open_trained(run)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, str(trained.checkpoint))
    whole = model.merge_and_unload()
    pairs, base = (
        pairs_of(adapter_weights(trained), trained.config.lora),
        load_file(next(tiny_llama.glob("*.safetensors"))),
    )
    for name, pair in pairs.items():
        torch.testing.assert_close(
            whole.state_dict()[name], merged(base[name], pair, torch.float32)
        )


def test_the_table_shows_all_three_and_what_a_wrong_scale_would_cost(run, tmp_path, capsys):
    assert main(["merge", str(run), str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    facts = json.loads((tmp_path / "out" / "glassloop_merge.json").read_text())
    lines = {line["name"]: line for line in facts["table"]}
    assert list(lines) == [
        "NF4 without the adapter",
        "adapter on NF4",
        "merged into dequantised",
        "merged into original",
    ]
    assert lines["adapter on NF4"]["agreement"] == 1
    last = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])
    assert lines["adapter on NF4"]["loss_nats"] == pytest.approx(last["loss_nats"], abs=1e-5)
    assert lines["merged into dequantised"]["agreement"] > 0.95
    assert lines["merged into dequantised"]["loss_nats"] == pytest.approx(
        last["loss_nats"], abs=5e-3
    )
    assert lines["NF4 without the adapter"]["loss_nats"] > last["loss_nats"] + 0.1
    assert "next token as the adapter on NF4" in out and "of host memory" in out
    assert not list(
        tmp_path.glob(".*")
    )  # nothing is left of the merge that was for comparison only


def test_4_bits_only_where_asked_and_then_its_cost_is_shown(run, tmp_path, capsys):
    assert main(["merge", str(run), str(tmp_path / "four"), "--bits", "4"]) == 2
    assert "--accept-rounding" in capsys.readouterr().err and not (tmp_path / "four").exists()
    assert (
        main(["merge", str(run), str(tmp_path / "four"), "--bits", "4", "--accept-rounding"]) == 0
    )
    facts = json.loads((tmp_path / "four" / "glassloop_merge.json").read_text())
    assert facts["table"][-1]["name"] == "that, rounded to NF4 once more"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "four")
    assert any(isinstance(m, bitsandbytes.nn.Linear4bit) for m in model.modules())


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_a_table_that_fails_takes_no_merge_away(run, tmp_path, capsys, monkeypatch, kind):
    def too_much(*_args):
        raise kind("no room for 16 GiB")

    monkeypatch.setattr("glassloop.use.merge.job.look_at_folder", too_much)
    assert main(["merge", str(run), str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert (
        "no room for 16 GiB" in told.err
        and "is whole and stays" in told.err
        and "wrote" in told.out
    )
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "glassloop_merge.json").read_text())["table"] == []
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_is_said_in_words_and_leaves_nothing(run, tmp_path, capsys, monkeypatch):
    def full(*_args, **_kwargs):
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr("glassloop.use.merge.merge.save_file", full)
    assert main(["merge", str(run), str(tmp_path / "out"), "--no-table"]) == 2
    told = capsys.readouterr().err
    assert (
        "model.safetensors cannot be written" in told
        and "No space left" in told
        and "make room" in told
    )
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=1000))
    assert main(["merge", str(run), str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert (
        f"OUT = {tmp_path / 'out'}" in told
        and "as much again for the table" in told
        and not list(tmp_path.iterdir())
    )


def test_what_cannot_be_merged_is_refused_and_leaves_nothing(run, tmp_path, capsys, tiny_llama):
    torn_base = shutil.copytree(tiny_llama, tmp_path / "torn_base")
    weights = next(torn_base.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    taken = tmp_path / "taken"
    taken.mkdir()
    torn = copy_of(run, tmp_path / "torn")
    next(torn.glob("checkpoints/*/adapter_config.json")).write_text("{}")
    for words, message in (
        ([tmp_path / "none", tmp_path / "out"], "no folder"),
        ([torn, tmp_path / "out"], "adapter_config.json"),
        ([run, taken], "exists"),
        ([run, tmp_path / "no" / "out"], "no folder"),
        ([run, tmp_path / "out", "--model", torn_base], "another base"),
        ([run, tmp_path / "out", "--shard-gib", 0], "--shard-gib"),
        ([run, tmp_path / "out", "--shard-gib", "inf"], "--shard-gib inf"),
        ([run, tmp_path / "out", "--shard-gib", "nan"], "--shard-gib nan"),
        ([run, "/proc/out"], "nothing can be written into /proc"),
    ):
        assert main(["merge", *map(str, words)]) == 2, words
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_weights_that_are_torn_or_lack_a_layer_are_named(tmp_path, tiny_llama):
    base = load_file(next(tiny_llama.glob("*.safetensors")))
    save_file(base, tmp_path / "model.safetensors")
    pair = {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(4, 64)}
    with pytest.raises(ValueError, match="without its lora_B"):
        pairs_of(pair, LoraConfig())
    pair |= {"base_model.model.model.layers.9.mlp.up_proj.lora_B.weight": torch.zeros(128, 4)}
    from glassloop.use.merge.merge import write_merged

    with pytest.raises(ValueError, match=r"layers\.9"):
        list(
            write_merged(
                Weights(tmp_path),
                pairs_of(pair, LoraConfig()),
                tmp_path,
                dtype=torch.bfloat16,
                most_bytes=1 << 20,
            )
        )
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="cannot be read"):
        _ = Weights(tmp_path).names
    with pytest.raises(ValueError, match="pickled"):
        _ = Weights(tmp_path.parent / "nothing").names
    with safe_open(next(tiny_llama.glob("*.safetensors")), "pt") as file:
        assert set(file.keys()) == set(Weights(tiny_llama).names)
