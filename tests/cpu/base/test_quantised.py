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
from loaded_bases import CPU, copies, load
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)

from glassloop.base import copies as base_copies
from glassloop.base import quantised as base_cache
from glassloop.base.checksum import base_checksum
from glassloop.base.copies import copy_name
from glassloop.base.quantised import MANIFEST, load_base
from glassloop.base.reading import DTYPES
from glassloop.config import ModelConfig

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
    monkeypatch.setattr(base_copies, "version", lambda package: "0.51.0")
    names.add(copy_name("o/m", "h", model, torch.bfloat16, "cpu"))
    monkeypatch.setattr(base_copies, "version", lambda package: "0.51.7")
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
    monkeypatch.setattr(base_copies.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
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
