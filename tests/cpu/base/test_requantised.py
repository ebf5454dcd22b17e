"""Bases in FP8 and MXFP4: widened as transformers does, and rounded to NF4 when asked."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config

from glassloop.base.quantised import load_base
from glassloop.base.requantised import from_fp8, from_mxfp4, in_sixteen_bits
from glassloop.base.source import resolve_source
from glassloop.base.streamed import load_streamed
from glassloop.cli.plan import main as plan
from glassloop.config import ModelConfig
from glassloop.config.arguments import parse
from glassloop.doctor.checks import check_engine
from glassloop.doctor.findings import PROBLEM
from glassloop.plan.support import groups_of

CPU = torch.device("cpu")
BLOCK = 32  # of the published ones: 128


def as_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight as it is published: float8 and the factor of each block."""
    rows, columns = (size // BLOCK for size in weight.shape)
    parts = weight.float().view(rows, BLOCK, columns, BLOCK)
    scale = parts.abs().amax((1, 3)) / 448
    codes = (parts / scale.view(rows, 1, columns, 1)).to(torch.float8_e4m3fn)
    return codes.view(weight.shape), scale


@pytest.fixture(scope="module")
def fp8_folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The tiny Llama in FP8, in two files: a scale may lie in another than its weight."""
    folder = tmp_path_factory.mktemp("fp8")
    tensors = load_file(tiny_llama / "model.safetensors")
    parts: list[dict[str, Tensor]] = [{}, {}]
    for name, tensor in tensors.items():
        if "proj" in name:
            parts[0][name], parts[1][f"{name}_scale_inv"] = as_fp8(tensor)
        else:
            parts[1][name] = tensor
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((tiny_llama / "config.json").read_text())
    own = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    config["quantization_config"] = own | {"weight_block_size": [BLOCK, BLOCK]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def mxfp4_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gpt-oss as it is published: experts in blocks and scales."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, pad_token_id=0)
    config = AutoConfig.for_model(
        "gpt_oss", **sizes, **heads, num_local_experts=3, num_experts_per_tok=2
    )
    folder = tmp_path_factory.mktemp("mxfp4")
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = experts, outputs, inputs // 32
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 124, shape, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def model_of(folder: Path, cache: Path, **fields: Any) -> ModelConfig:
    return ModelConfig(id=str(folder), cache_dir=str(cache), **fields)


def load(model: ModelConfig) -> Any:
    return load_base(model, precision="bf16", device=CPU, first=contextlib.nullcontext)


def test_an_odd_fp8_weight_has_smaller_blocks_at_its_ends() -> None:
    torch.manual_seed(0)
    weight = torch.randn(70, 45).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 4)
    found = from_fp8(weight, scale, (32, 12))
    for row, column in ((0, 0), (31, 31), (32, 31), (69, 44), (64, 32), (5, 40)):
        wanted = weight[row, column].float() * scale[row // 32, column // 12]
        assert found[row, column] == wanted.bfloat16()
    with pytest.raises(ValueError, match=r"scales \(2, 4\) torch.float32, not \(3, 4\)"):
        from_fp8(weight, scale[:2], (32, 12))


def test_mxfp4_codes_and_exponents_are_read_as_the_format_has_them() -> None:
    blocks = torch.arange(16, dtype=torch.uint8).view(1, 1, 1, 16) + 16 * 9  # high: -0.5
    found = from_mxfp4(blocks, torch.full((1, 1, 1), 129, dtype=torch.uint8)).flatten()
    low = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert found[0::2].tolist() == [4 * one for one in low]
    assert found[1::2].tolist() == [-2.0] * 16


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_the_files_are_widened_to_the_weights_that_transformers_reads(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    folder: Path = request.getfixturevalue(f"{kind}_folder")
    settings = {"quantization_config": Mxfp4Config(dequantize=True)} if kind == "mxfp4" else {}
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **settings)
    model = model_of(folder, tmp_path, requantize=True)
    with in_sixteen_bits(resolve_source(model), model, tmp_path / "copies" / "made") as plain:
        ours = AutoModelForCausalLM.from_pretrained(plain.path, dtype=torch.bfloat16)
    wanted = dict(theirs.named_parameters())
    found = dict(ours.named_parameters())
    assert found.keys() == wanted.keys()
    for name, parameter in found.items():
        assert torch.equal(parameter, wanted[name]), name
    assert not list((tmp_path / "copies").iterdir())


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_without_a_request_they_are_refused_with_the_setting(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    folder = request.getfixturevalue(f"{kind}_folder")
    fields = {"attention": "eager"} if kind == "mxfp4" else {}
    with pytest.raises(ValueError, match=rf"comes quantised as {kind}.*model\.requantize=true"):
        load(model_of(folder, tmp_path, **fields))
    plain = model_of(folder, tmp_path, quantization="none", requantize=True, **fields)
    with pytest.raises(ValueError, match=r"bitsandbytes: take the unquantised repository"):
        load(plain)
    hf, report = load(model_of(folder, tmp_path, requantize=True, **fields))
    assert any("rounds its weights to NF4 once more" in note for note in report.notes)
    assert any(hasattr(module, "quant_state") for module in hf.modules())
    _, second = load(model_of(folder, tmp_path, requantize=True, **fields))
    assert second.from_cache and second.checksum == report.checksum


PUBLISHED: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "gptq"}, "comes quantised as gptq, not as NF4 by bitsandbytes: take"),
    ({"quant_method": "awq"}, "comes quantised as awq, "),
    ({"quant_method": "fp8"}, r"comes quantised as fp8, .*model\.requantize=true"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "comes quantised as 8 bits, not"),
    ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "comes quantised as fp4, "),
]


@pytest.mark.parametrize(("own", "said"), PUBLISHED, ids=[said[19:24] for _, said in PUBLISHED])
def test_a_plan_and_doctor_refuse_what_a_run_does_not_read(
    fp8_folder: Path, tmp_path: Path, own: dict[str, Any], said: str
) -> None:
    values = json.loads((fp8_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"quantization_config": own}))
    with pytest.raises(ValueError, match=said):
        load(model_of(tmp_path, tmp_path / "cache"))
    words = [f"model.id={tmp_path}", "data.source=scam"]
    with pytest.raises(ValueError, match=said):
        plan(["--rows", "40", *words])
    (finding,) = check_engine(parse(words), on_cuda=False)
    assert re.search(said, finding.text) and finding.level == PROBLEM


def test_a_plan_takes_what_a_run_reads(fp8_folder: Path) -> None:
    assert plan(["--rows", "40", f"model.id={fp8_folder}", "model.requantize=true"]) == 0


def test_attention_that_a_model_lacks_is_refused_before_its_weights_are_read(
    mxfp4_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of gpt-oss-120b would be widened to 240 GB first."""

    def fail(*_: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("glassloop.base.quantised.base_hash", fail)
    for fields in ({"requantize": True}, {"requantize": True, "attention": "sdpa"}):
        with pytest.raises(ValueError, match=r"attention = sdpa is not .*attention=eager"):
            load(model_of(mxfp4_folder, tmp_path, **fields))
    with pytest.raises(AssertionError, match="weights were read"):
        load(model_of(mxfp4_folder, tmp_path, requantize=True, attention="eager"))


def test_a_file_of_layers_holds_the_same_nf4_as_transformers_makes(
    fp8_folder: Path, tmp_path: Path
) -> None:
    model = model_of(fp8_folder, tmp_path, requantize=True)
    hf, _ = load(model)
    shared: dict[str, Any] = dict(precision="bf16", device=CPU, first=contextlib.nullcontext)
    streamed, report, pages = load_streamed(model, groups_of, **shared)
    assert any("once more" in note for note in report.notes)
    ids = torch.arange(3, 40).unsqueeze(0)
    assert torch.equal(hf(ids).logits, streamed(ids).logits)
    pages.close()


Damage = Callable[[dict[str, Tensor]], None]


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.0.mlp.experts.down_proj_scales"]


def cut(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.0.mlp.experts.down_proj_scales"
    tensors[name] = tensors[name][:, :-1].contiguous()


def other(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = torch.zeros(64, dtype=torch.int8)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (drop, "down_proj_scales is missing from its files"),
        (cut, r"down_proj_blocks has a form that is not read here \(blocks \(3, 64, 3, 16\)"),
        (other, r"model.norm.weight has a form that is not read here \(it is torch.int8\)"),
    ],
)
def test_a_damaged_folder_is_refused_by_tensor(
    mxfp4_folder: Path, tmp_path: Path, damage: Damage, said: str
) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "config.json").write_text((mxfp4_folder / "config.json").read_text())
    tensors = load_file(mxfp4_folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=said):
        load(model_of(folder, tmp_path, requantize=True, attention="eager"))
    assert not [*(tmp_path / "quantized").iterdir()]


def test_a_run_trains_on_it_says_so_and_records_it(
    run_of, fp8_folder: Path, tmp_path: Path, tiny_tokenizer
) -> None:
    tiny_tokenizer.save_pretrained(fp8_folder)
    run = run_of(model={"id": str(fp8_folder), "requantize": True})
    assert any("comes quantised as fp8: model.requantize" in line for line in run.header)
    assert "requantize: true" in (run.folder / "config.yaml").read_text()
    run.close()
