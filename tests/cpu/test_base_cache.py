"""Where a base comes from, its quantised copy, and what a person reads when it cannot be loaded."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from glassloop import base_cache, base_source, cache
from glassloop.base_cache import MANIFEST, LoadReport, copy_name, load_base
from glassloop.base_source import base_hash, resolve_source
from glassloop.config import ModelConfig
from glassloop.model_checks import base_checksum
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

CPU = torch.device("cpu")
COMMIT = "c0ffee" * 6 + "abcd"


def load(folder: Path | str, cache_dir: Path, *, precision: str = "bf16", **model: object) -> tuple[PreTrainedModel, LoadReport]:
    config = ModelConfig(id=str(folder), cache_dir=str(cache_dir), **model)  # type: ignore[arg-type]
    return load_base(config, precision=precision, device=CPU, first=contextlib.nullcontext)


def copies(cache_dir: Path) -> list[Path]:
    return sorted(path for path in (cache_dir / "quantized").iterdir() if not path.name.startswith("."))


# --- the quantised copy


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("double", [True, False])
def test_copy_is_byte_equal_to_quantising_again(tiny_qwen2: Path, tmp_path: Path, precision: str, double: bool) -> None:
    first, report = load(tiny_qwen2, tmp_path, precision=precision, double_quantization=double)
    second, again = load(tiny_qwen2, tmp_path, precision=precision, double_quantization=double)
    assert (report.from_cache, again.from_cache) == (False, True)
    dtype = base_cache.DTYPES[precision]
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=dtype
    )
    direct = AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=dtype, quantization_config=settings, device_map={"": "cpu"})
    expected = direct.state_dict()
    assert any("absmax" in name for name in expected)
    for hf in (first, second):
        state = hf.state_dict()
        assert state.keys() == expected.keys()
        assert all(state[name].dtype == expected[name].dtype and torch.equal(state[name], expected[name]) for name in state)
    assert report.checksum == again.checksum == base_checksum(direct)
    ids = torch.tensor([[1, 7, 8, 9]])
    with torch.no_grad():
        assert torch.equal(first(ids).logits, second(ids).logits)


def test_ranks_read_what_the_first_one_made(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantised once, inside the context in which one rank goes first; every rank loads the same copy."""
    inside = []
    quantised = []
    real = base_cache._load

    def spy(path: str, *args: object) -> PreTrainedModel:
        quantised.append((len(args) == 5, bool(inside)))  # (with quantisation settings, within `first`)
        return real(path, *args)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def first() -> Iterator[None]:
        inside.append(1)
        yield
        inside.pop()

    monkeypatch.setattr(base_cache, "_load", spy)
    config = ModelConfig(id=str(tiny_llama), cache_dir=str(tmp_path))
    reports = [load_base(config, precision="bf16", device=CPU, first=first)[1] for _ in range(2)]
    assert quantised == [(True, True), (False, False), (False, False)]
    assert [report.from_cache for report in reports] == [False, True]
    assert reports[0].checksum == reports[1].checksum
    assert reports[0].folder == reports[1].folder == str(copies(tmp_path)[0])


def test_every_setting_that_decides_the_bytes_has_its_own_copy(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelConfig()
    names = {
        copy_name("o/m", "h", model, torch.bfloat16, "cpu"),
        copy_name("o/m", "other", model, torch.bfloat16, "cpu"),
        copy_name("o/m", "h", model.model_copy(update={"double_quantization": False}), torch.bfloat16, "cpu"),
        copy_name("o/m", "h", model, torch.float16, "cpu"),
        copy_name("o/m", "h", model, torch.bfloat16, "cuda"),
    }
    assert copy_name("elsewhere/m", "h", model, torch.bfloat16, "cpu") in names, "the name decides no byte"
    monkeypatch.setattr(base_cache, "version", lambda package: "0.51.0")
    names.add(copy_name("o/m", "h", model, torch.bfloat16, "cpu"))
    monkeypatch.setattr(base_cache, "version", lambda package: "0.51.7")
    assert copy_name("o/m", "h", model, torch.bfloat16, "cpu") in names, "a patch release of bitsandbytes decides no byte"
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


def test_damage_anywhere_in_a_copy_is_found_and_named(tiny_llama: Path, tmp_path: Path) -> None:
    """A flipped byte in any file, wherever it falls, or a cut or missing file: refused, naming the folder and the cure."""
    load(tiny_llama, tmp_path)
    (copy,) = copies(tmp_path)
    rng = random.Random(0)
    damaged = rf"the quantised copy of model.id = .* is damaged .*: delete the folder {copy}"
    files = sorted(copy.iterdir())
    assert {"config.json", "model.safetensors", MANIFEST} <= {file.name for file in files}
    for file in files:
        whole = file.read_bytes()
        places = [rng.randrange(len(whole)) for _ in range(25 if file.suffix == ".safetensors" else 2)]
        # also within the JSON that describes the tensors
        places += [rng.randrange(8, 2000) for _ in range(10)] if file.suffix == ".safetensors" else []
        harmless = whole.index(b'"name"'), whole.index(b'"checksum"') if file.name == MANIFEST else 0
        for place in places:
            if file.name == MANIFEST and harmless[0] <= place < harmless[1]:
                continue  # name, commit and hash are there for people
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
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


def test_too_little_disk_space_names_the_field(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"model.cache_dir: the quantised base needs .* GiB free: make room"):
        load(tiny_llama, tmp_path)
    assert list((tmp_path / "quantized").iterdir()) == []


def test_generation_settings_come_along_as_they_are(tiny_llama: Path, tmp_path: Path) -> None:
    """Some repositories hold a generation_config.json that save_pretrained refuses to write."""
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.6, "eos_token_id": [2, 5]}))
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


# --- the cache's folders


def test_cache_is_the_field_else_the_variable_else_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GLASSLOOP_CACHE", str(tmp_path / "variable"))
    assert cache.cache_root(str(tmp_path / "field")) == tmp_path / "field"
    assert cache.cache_root(None) == tmp_path / "variable"
    monkeypatch.delenv("GLASSLOOP_CACHE")
    assert cache.cache_root(None) == tmp_path / ".cache" / "glassloop"
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"model.cache_dir = .* cannot be made"):
        cache.cache_root(str(tmp_path / "file" / "x"))


def test_two_writers_publish_one_whole_folder(tmp_path: Path) -> None:
    barrier = threading.Barrier(2)
    failures: list[BaseException] = []

    def write(content: str) -> None:
        try:
            with cache.published(tmp_path / "made") as temporary:
                for name in "ab":
                    (temporary / name).write_text(content)
                barrier.wait(10)
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(content,)) for content in ("one", "two")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert failures == []
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert (tmp_path / "made" / "a").read_text() == (tmp_path / "made" / "b").read_text()
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o755


def test_what_dead_writers_left_is_cleared_away_in_time(tmp_path: Path) -> None:
    for name, age_s in ((".made.old", 2 * cache.ABANDONED_S), (".made.young", 60.0), (".other.old", 2 * cache.ABANDONED_S)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    with cache.published(tmp_path / "made"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {".made.young", ".other.old", "made"}


# --- hashes of local folders


def test_local_base_is_hashed_once_and_again_when_it_changes(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, memo = shutil.copytree(tiny_llama, tmp_path / "base"), tmp_path / "memo.json"
    source = resolve_source(ModelConfig(id=str(folder)))
    read = []
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda handle, kind: read.append(handle.name) or real(handle, kind))
    first = base_hash(source, memo)
    assert {Path(name).name for name in read} == {"config.json", "model.safetensors"}
    assert base_hash(source, memo) == first
    assert len(read) == 2
    memo.write_text("{torn")
    assert base_hash(source, memo) == first
    assert len(read) == 4
    weights = folder / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert base_hash(source, memo) != first
    assert len(read) == 5
    (folder / "tokenizer.json").write_text("{}")
    changed = base_hash(source, memo)
    moved = Path(shutil.move(folder, tmp_path / "moved"))
    assert base_hash(resolve_source(ModelConfig(id=str(moved))), memo) == changed, "the folder's name is no part of it"


def test_safetensors_are_preferred_to_bin(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no weights \(\*.safetensors or \*.bin\)"):
        base_source.base_files(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert [file.name for file in base_source.base_files(tmp_path)] == ["config.json", "pytorch_model.bin"]
    (tmp_path / "model.safetensors").touch()
    assert [file.name for file in base_source.base_files(tmp_path)] == ["config.json", "model.safetensors"]


# --- the hub


@pytest.fixture
def hub(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds owner/tiny at one commit, as huggingface_hub lays it out."""
    root = tmp_path / "hub"
    repo = root / "models--owner--tiny"
    shutil.copytree(tiny_llama, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    return root


def answer(monkeypatch: pytest.MonkeyPatch, reply: object) -> list[str]:
    """Let the hub give this commit, or raise this error; returns the revisions that were asked for."""
    asked: list[str] = []

    def model_info(self: HfApi, repo_id: str, *, revision: str, timeout: float) -> SimpleNamespace:
        asked.append(revision)
        if isinstance(reply, BaseException):
            raise reply
        return SimpleNamespace(sha=reply)

    monkeypatch.setattr(HfApi, "model_info", model_info)
    return asked


def test_branch_becomes_a_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch, COMMIT)
    source = resolve_source(ModelConfig(id="owner/tiny", revision="v1"))
    assert (source.name, source.path, source.revision, source.commit, source.folder) == ("owner/tiny", "owner/tiny", COMMIT, COMMIT, None)
    resolve_source(ModelConfig(id="owner/tiny"))
    assert asked == ["v1", "main"]


def test_downloaded_copy_serves_while_the_hub_is_out_of_reach(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, ConnectionError("no route"))
    source = resolve_source(ModelConfig(id="owner/tiny"))
    assert (source.name, source.commit, source.folder) == ("owner/tiny", COMMIT, hub / "models--owner--tiny" / "snapshots" / COMMIT)
    _, report = load("owner/tiny", tmp_path / "cache")
    assert (report.name, report.commit) == ("owner/tiny", COMMIT)
    assert report.notes == (f"the hub cannot be reached: using the downloaded copy of owner/tiny, commit {COMMIT}",)
    with pytest.raises(ValueError, match=r"model.id = owner/other \(revision main\) is not on this machine, .*no route"):
        resolve_source(ModelConfig(id="owner/other"))
    with pytest.raises(ValueError, match=r"model.id = owner/tiny \(revision v2\) is not on this machine"):
        resolve_source(ModelConfig(id="owner/tiny", revision="v2"))


def test_quantised_copy_is_the_same_with_and_without_the_hub(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And once it is there, the original weights are not needed."""
    answer(monkeypatch, ConnectionError("no route"))
    made = load("owner/tiny", tmp_path / "cache")[1]
    (hub / "models--owner--tiny" / "snapshots" / COMMIT / "model.safetensors").unlink()
    assert load("owner/tiny", tmp_path / "cache")[1].from_cache
    answer(monkeypatch, COMMIT)
    source = resolve_source(ModelConfig(id="owner/tiny"))
    assert base_hash(source, tmp_path / "memo.json") == made.base_hash
    answer(monkeypatch, COMMIT[::-1])
    assert base_hash(resolve_source(ModelConfig(id="owner/tiny")), tmp_path / "memo.json") != made.base_hash


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RepositoryNotFoundError, r"model.id = owner/tiny is neither a folder nor a model on the hub: check the spelling"),
        (RevisionNotFoundError, r"model.revision = v1 does not exist in owner/tiny: give a commit, tag or branch"),
        (GatedRepoError, r"model.id = owner/tiny is gated: accept its licence .*hf auth login"),
    ],
)
def test_hub_errors_name_the_field(monkeypatch: pytest.MonkeyPatch, error: type[Exception], message: str) -> None:
    answer(monkeypatch, error.__new__(error))
    with pytest.raises(ValueError, match=message):
        resolve_source(ModelConfig(id="owner/tiny", revision="v1"))


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("./nowhere", None, r"model.id = ./nowhere is no folder on this machine"),
        ("/a/b/c", None, r"model.id = /a/b/c is no folder"),
        ("{folder}", "main", r"model.revision = main means nothing for the local folder"),
        ("{empty}", None, r"is a folder without config.json"),
    ],
)
def test_local_folders_that_cannot_be_are_refused(tiny_llama: Path, tmp_path: Path, name: str, revision: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_source(ModelConfig(id=name.format(folder=tiny_llama, empty=tmp_path), revision=revision))


# --- what does not load as asked


def test_repository_that_comes_quantised_keeps_its_own_weights(tiny_llama: Path, tmp_path: Path) -> None:
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False, bnb_4bit_compute_dtype=torch.float16
    )
    direct = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16, quantization_config=settings, device_map={"": "cpu"})
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
    with pytest.raises(ValueError, match=r"comes quantised as NF4, but model.quantization = none: set it to nf4"):
        load(tmp_path / "base", tmp_path, quantization="none")


@pytest.mark.parametrize(
    ("own", "kind"),
    [({"quant_method": "gptq", "bits": 4}, "gptq"), ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "fp4")],
)
def test_repository_quantised_in_another_way_is_refused(tiny_llama: Path, tmp_path: Path, own: dict, kind: str) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": own}))
    with pytest.raises(ValueError, match=rf"comes quantised as {kind}, not as NF4 by bitsandbytes: take the unquantised"):
        load(folder, tmp_path)


def test_missing_weights_are_refused_instead_of_drawn_at_random(tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for quantization in ("none", "nf4"):
        with pytest.raises(ValueError, match=r"1 weights are missing .*model.layers.1.mlp.up_proj.weight"):
            load(folder, tmp_path, quantization=quantization)


def test_model_with_code_of_its_own_runs_only_when_told_to(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    code = "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
    code += "class OwnConfig(LlamaConfig):\n    model_type = 'own_kind'\n\n\nclass OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    (folder / "own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_kind", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model.id = .*Python code of its own.*set model.trust_remote_code=true"):
        load(folder, tmp_path)
    for quantization in ("none", "nf4", "nf4"):
        hf, report = load(folder, tmp_path, trust_remote_code=True, quantization=quantization)
        assert type(hf).__name__ == "OwnModel"
    assert report.from_cache


def test_other_kinds_of_model_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    for kind in ("vit", "not_yet_invented"):
        (folder / "config.json").write_text(json.dumps(config | {"model_type": kind, "architectures": ["X"]}))
        with pytest.raises(ValueError, match=r"model.id = .* knows no causal language model of its kind .*update transformers"):
            load(folder, tmp_path)


def test_torn_weights_of_a_local_folder_name_model_id(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"model.id = {folder}"):
        load(folder, tmp_path)


def test_flash_attention_that_is_not_there_names_the_field(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"flash_attention_2 has no fp32: set model.attention=sdpa"):
        load(tiny_llama, tmp_path, attention="flash_attention_2", precision="fp32")
    load(tiny_llama, tmp_path)  # a copy that is there must not hide it
    with pytest.raises(ValueError, match=r"model.attention = flash_attention_2 cannot run here .*set model.attention=sdpa"):
        load(tiny_llama, tmp_path, attention="flash_attention_2")


def test_full_disk_is_not_called_a_bad_model_id() -> None:
    with pytest.raises(OSError, match="No space left") as caught, base_source.loading_errors(ModelConfig()):
        raise OSError(28, "No space left on device")
    assert not isinstance(caught.value, ValueError)


def test_config_of_another_shape_than_the_weights_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(ValueError, match=rf"model.id = {folder}"):
        load(folder, tmp_path)
