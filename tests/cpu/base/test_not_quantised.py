"""Bases that do not load as asked are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from loaded_bases import load
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from glassloop.base import source as base_source
from glassloop.base.checksum import base_checksum
from glassloop.config import ModelConfig

# --- what does not load as asked


def test_repository_that_comes_quantised_keeps_its_own_weights(
    tiny_llama: Path, tmp_path: Path
) -> None:
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=False,
        bnb_4bit_compute_dtype=torch.float16,
    )
    direct = AutoModelForCausalLM.from_pretrained(
        tiny_llama, dtype=torch.bfloat16, quantization_config=settings, device_map={"": "cpu"}
    )
    direct.save_pretrained(tmp_path / "base")
    hf, report = load(tmp_path / "base", tmp_path)
    assert base_checksum(hf) == base_checksum(direct)
    assert hf.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16
    assert report.notes == (
        f"model.id = {tmp_path / 'base'} comes quantised: its own NF4 weights are used",
        "its double quantisation is False; model.double_quantization = True has no effect",
        "its compute dtype float16 is replaced by bfloat16",
    )
    assert not (tmp_path / "quantized").exists()
    with pytest.raises(
        ValueError, match=r"comes quantised as NF4, but model.quantization = none: set it to nf4"
    ):
        load(tmp_path / "base", tmp_path, quantization="none")


@pytest.mark.parametrize(
    ("own", "kind"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
            "fp4",
        ),
    ],
)
def test_repository_quantised_in_another_way_is_refused(
    tiny_llama: Path, tmp_path: Path, own: dict, kind: str
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": own}))
    with pytest.raises(
        ValueError,
        match=rf"comes quantised as {kind}, not as NF4 by bitsandbytes: take the unquantised",
    ):
        load(folder, tmp_path)


def test_missing_weights_are_refused_instead_of_drawn_at_random(
    tiny_llama: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for quantization in ("none", "nf4"):
        with pytest.raises(
            ValueError, match=r"1 weights are missing .*model.layers.1.mlp.up_proj.weight"
        ):
            load(folder, tmp_path, quantization=quantization)


def test_model_with_code_of_its_own_runs_only_when_told_to(
    tiny_llama: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    code = "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
    code += "class OwnConfig(LlamaConfig):\n    model_type = 'own_kind'\n\n\n"
    code += "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    (folder / "own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own_kind",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"model.id = .*Python code of its own.*set model.trust_remote_code=true"
    ):
        load(folder, tmp_path)
    for quantization in ("none", "nf4", "nf4"):
        hf, report = load(folder, tmp_path, trust_remote_code=True, quantization=quantization)
        assert type(hf).__name__ == "OwnModel"
    assert report.from_cache


def test_other_kinds_of_model_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    for kind in ("vit", "not_yet_invented"):
        (folder / "config.json").write_text(
            json.dumps(config | {"model_type": kind, "architectures": ["X"]})
        )
        with pytest.raises(
            ValueError,
            match=r"model.id = .* knows no causal language model of its kind .*update transformers",
        ):
            load(folder, tmp_path)


def test_torn_weights_of_a_local_folder_name_model_id(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"model.id = {folder}"):
        load(folder, tmp_path)


def test_flash_attention_that_is_not_there_names_the_field(
    tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"flash_attention_2 has no fp32: set model.attention=sdpa"
    ):
        load(tiny_llama, tmp_path, attention="flash_attention_2", precision="fp32")
    load(tiny_llama, tmp_path)  # a copy that is there must not hide it
    with pytest.raises(
        ValueError,
        match=r"model.attention = flash_attention_2 cannot run here .*set model.attention=sdpa",
    ):
        load(tiny_llama, tmp_path, attention="flash_attention_2")


def test_full_disk_is_not_called_a_bad_model_id() -> None:
    with (
        pytest.raises(OSError, match="No space left") as caught,
        base_source.loading_errors(ModelConfig()),
    ):
        raise OSError(28, "No space left on device")
    assert not isinstance(caught.value, ValueError)


def test_config_of_another_shape_than_the_weights_is_refused(
    tiny_llama: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    ).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    for quantization in ("none", "nf4"):
        with pytest.raises(
            ValueError,
            match=rf"model.id = {folder}.*(mismatch|in config.json: take .* fits its weights)",
        ):
            load(folder, tmp_path, quantization=quantization)


def test_an_architecture_that_does_not_load_in_nf4_is_no_damaged_copy(tmp_path: Path) -> None:
    """Llama 4's experts are written in 4 bits, and transformers does not read them back."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "intermediate_size_mlp": 128}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(
        "llama4_text", **sizes, **heads, head_dim=16, vocab_size=64, num_local_experts=2
    )
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "llama4")
    for _ in range(2):  # the second launch says the same
        with pytest.raises(ValueError, match=r"transformers cannot load its NF4 weights") as error:
            load(tmp_path / "llama4", tmp_path)
        assert "delete the folder" not in str(error.value)
        assert "Set model.quantization=none" in str(error.value)
    assert not [*(tmp_path / "quantized").iterdir()]
