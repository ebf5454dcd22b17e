"""A base's quantised copy, and messages when it cannot be loaded."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from glassloop.base import quantised as base_cache
from glassloop.base import source as base_source
from glassloop.base.checksum import base_checksum
from glassloop.base.quantised import MANIFEST, LoadReport, copy_name, load_base
from glassloop.base.reading import DTYPES
from glassloop.config import ModelConfig

CPU = torch.device("cpu")
COMMIT = "c0ffee" * 6 + "abcd"


def load(
    folder: Path | str, cache_dir: Path, *, precision: str = "bf16", **model: object
) -> tuple[PreTrainedModel, LoadReport]:
    config = ModelConfig(id=str(folder), cache_dir=str(cache_dir), **model)  # type: ignore[arg-type]
    return load_base(config, precision=precision, device=CPU, first=contextlib.nullcontext)


def copies(cache_dir: Path) -> list[Path]:
    return sorted(
        path for path in (cache_dir / "quantized").iterdir() if not path.name.startswith(".")
    )


# --- the quantised copy


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("double", [True, False])
def test_copy_is_byte_equal_to_quantising_again(
    tiny_qwen2: Path, tmp_path: Path, precision: str, double: bool
) -> None:
    first, report = load(tiny_qwen2, tmp_path, precision=precision, double_quantization=double)
    second, again = load(tiny_qwen2, tmp_path, precision=precision, double_quantization=double)
    assert (report.from_cache, again.from_cache) == (False, True)
    dtype = DTYPES[precision]
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
    )
    direct = AutoModelForCausalLM.from_pretrained(
        tiny_qwen2, dtype=dtype, quantization_config=settings, device_map={"": "cpu"}
    )
    expected = direct.state_dict()
    assert any("absmax" in name for name in expected)
    for hf in (first, second):
        state = hf.state_dict()
        assert state.keys() == expected.keys()
        assert all(
            state[name].dtype == expected[name].dtype and torch.equal(state[name], expected[name])
            for name in state
        )
    assert report.checksum == again.checksum == base_checksum(direct)
    ids = torch.tensor([[1, 7, 8, 9]])
    with torch.no_grad():
        assert torch.equal(first(ids).logits, second(ids).logits)


def test_ranks_read_what_the_first_one_made(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank quantises while the others wait; all load the copy."""
    inside = []
    quantised = []
    real = base_cache.read_model

    def spy(*args: object, quantize: object = None, **rest: object) -> PreTrainedModel:
        quantised.append((quantize is not None, bool(inside)))
        return real(*args, quantize=quantize, **rest)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def first() -> Iterator[None]:
        inside.append(1)
        yield
        inside.pop()

    monkeypatch.setattr(base_cache, "read_model", spy)
    config = ModelConfig(id=str(tiny_llama), cache_dir=str(tmp_path))
    reports = [load_base(config, precision="bf16", device=CPU, first=first)[1] for _ in range(2)]
    assert quantised == [(True, True), (False, False), (False, False)]
    assert [report.from_cache for report in reports] == [False, True]
    assert reports[0].checksum == reports[1].checksum
    assert reports[0].folder == reports[1].folder == str(copies(tmp_path)[0])


def test_the_first_rank_of_a_second_host_writes_the_copy_too(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' save_pretrained is silent on every global rank but 0."""
    from transformers.distributed import mixin

    monkeypatch.setattr(mixin, "_is_torch_distributed_initialized", lambda: True)
    monkeypatch.setattr(mixin, "_get_torch_distributed_rank", lambda: 2)
    _, report = load(tiny_llama, tmp_path)
    assert (Path(report.folder or "") / "config.json").is_file()
    assert load(tiny_llama, tmp_path)[1].from_cache


def test_every_setting_that_decides_the_bytes_has_its_own_copy(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelConfig()
    names = {
        copy_name("o/m", "h", model, torch.bfloat16, "cpu"),
        copy_name("o/m", "other", model, torch.bfloat16, "cpu"),
        copy_name(
            "o/m",
            "h",
            model.model_copy(update={"double_quantization": False}),
            torch.bfloat16,
            "cpu",
        ),
        copy_name("o/m", "h", model, torch.float16, "cpu"),
        copy_name("o/m", "h", model, torch.bfloat16, "cuda"),
    }
    assert copy_name("elsewhere/m", "h", model, torch.bfloat16, "cpu") in names, (
        "the name decides no byte"
    )
    monkeypatch.setattr(base_cache, "version", lambda package: "0.51.0")
    names.add(copy_name("o/m", "h", model, torch.bfloat16, "cpu"))
    monkeypatch.setattr(base_cache, "version", lambda package: "0.51.7")
    assert copy_name("o/m", "h", model, torch.bfloat16, "cpu") in names, (
        "a patch release of bitsandbytes decides no byte"
    )
    assert len(names) == 6


def test_changed_weights_are_quantised_again(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    _, before = load(folder, tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    hf.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    hf.save_pretrained(folder)
    _, after = load(folder, tmp_path)
    assert not after.from_cache
    assert before.base_hash != after.base_hash
    assert before.checksum != after.checksum
    assert len(copies(tmp_path)) == 2


@pytest.mark.parametrize("weights_hashed", [True, False])
def test_damage_anywhere_in_a_copy_is_found_and_named(
    tiny_llama: Path, tmp_path: Path, weights_hashed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flipped byte anywhere, or a cut or missing file, is refused.

    The message names folder and cure. Small files are compared by hash, large ones by what loads
    from them.
    """
    if not weights_hashed:
        monkeypatch.setattr(base_cache, "HASHED_BYTES", 50_000)
    load(tiny_llama, tmp_path)
    (copy,) = copies(tmp_path)
    rng = random.Random(0)
    damaged = rf"the quantised copy of model.id = .* is damaged .*: delete the folder {copy}"
    files = sorted(copy.iterdir())
    assert {"config.json", "model.safetensors", MANIFEST} <= {file.name for file in files}
    assert (
        json.loads((copy / MANIFEST).read_text())["files"]["model.safetensors"]["sha256"]
        is not None
    ) == weights_hashed
    for file in files:
        whole = file.read_bytes()
        places = [
            rng.randrange(len(whole)) for _ in range(25 if file.suffix == ".safetensors" else 2)
        ]
        # also within the JSON that describes the tensors
        places += (
            [rng.randrange(8, 2000) for _ in range(10)] if file.suffix == ".safetensors" else []
        )
        harmless = (
            (whole.index(b'"name"'), whole.index(b'"checksum"'))
            if file.name == MANIFEST
            else (0, 0)
        )
        for place in places:
            if harmless[0] <= place < harmless[1]:
                continue  # name, commit and hash are there for people
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
            with pytest.raises(ValueError, match=damaged):
                load(tiny_llama, tmp_path)
        if (
            file.suffix == ".safetensors"
        ):  # a tensor of another name: transformers would draw the missing one at random
            file.write_bytes(whole.replace(b'"model.norm.weight"', b'"model.norm.weighs"'))
            with pytest.raises(ValueError, match=damaged):
                load(tiny_llama, tmp_path)
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=damaged):
            load(tiny_llama, tmp_path)
        file.unlink()
        with pytest.raises(ValueError, match=damaged):
            load(tiny_llama, tmp_path)
        file.write_bytes(whole)
    assert load(tiny_llama, tmp_path)[1].from_cache


def test_a_launch_that_dies_while_quantising_leaves_no_copy(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = PreTrainedModel.save_pretrained

    def dies(self: PreTrainedModel, folder: Path, *args: object, **rest: object) -> None:
        real(self, folder, *args, **rest)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", dies)
    with pytest.raises(KeyboardInterrupt):
        load(tiny_llama, tmp_path)
    assert list((tmp_path / "quantized").iterdir()) == []
    monkeypatch.undo()
    assert not load(tiny_llama, tmp_path)[1].from_cache


def test_too_little_disk_space_names_the_field(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(
        ValueError, match=r"model.cache_dir: the quantised base needs .* GiB free: make room"
    ):
        load(tiny_llama, tmp_path)
    assert list((tmp_path / "quantized").iterdir()) == []


def test_generation_settings_come_along_as_they_are(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some repositories hold settings that transformers refuses to save.

    All of them before 5.2x.
    """
    real = GenerationConfig.save_pretrained

    def strict(self: GenerationConfig, *args: object, **rest: object) -> None:
        self.validate(strict=True)
        real(self, *args, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(GenerationConfig, "save_pretrained", strict)
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": False, "temperature": 0.6, "eos_token_id": [2, 5]})
    )
    for _ in range(2):
        hf, _ = load(folder, tmp_path)
        assert hf.generation_config is not None
        assert hf.generation_config.eos_token_id == [2, 5]
        assert hf.generation_config.temperature == 0.6


def test_unquantised_base_is_read_where_it_lies(tiny_llama: Path, tmp_path: Path) -> None:
    hf, report = load(tiny_llama, tmp_path, quantization="none")
    assert not (tmp_path / "quantized").exists()
    assert not report.from_cache
    assert report.folder == str(tiny_llama)
    assert report.checksum == base_checksum(hf)
    assert not any(p.requires_grad for p in hf.parameters())
    assert {p.dtype for p in hf.parameters()} == {torch.bfloat16}


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
