"""A merge reads the file of layers as it reads the quantised copy."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from glassloop.base.hashing import base_hash
from glassloop.base.layer_file import LayerFile
from glassloop.base.quantised import find_base
from glassloop.base.source import resolve_source
from glassloop.base.streamed import layer_folder
from glassloop.config import ModelConfig
from glassloop.plan.support import groups_of
from glassloop.use.merge.layer_weights import LayerWeights
from glassloop.use.merge.merge import AdapterPair, write_merged
from glassloop.use.merge.weights import Weights

CPU = torch.device("cpu")


@pytest.fixture(params=["tiny_llama", "tiny_qwen2", "tied"])
def folder(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path: Path) -> Path:
    if request.param != "tied":
        return request.getfixturevalue(request.param)
    config = LlamaConfig.from_pretrained(tiny_llama)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


@pytest.mark.parametrize("double", [True, False])
def test_every_tensor_is_the_one_of_the_quantised_copy(
    folder: Path, double: bool, tmp_path: Path
) -> None:
    model = ModelConfig(
        id=str(folder),
        double_quantization=double,
        cache_dir=str(tmp_path / "cache"),
        quantization="nf4",
    )
    source = resolve_source(model)
    known = base_hash(source, tmp_path / "hashes.json")
    made, _ = layer_folder(source, known, model, groups_of, torch.float32, CPU)
    ours = LayerWeights(LayerFile.open(made), torch.float32)
    copy = find_base(model, precision="fp32", device=CPU, first=contextlib.nullcontext)
    assert copy.folder is not None
    theirs = Weights(Path(copy.folder), torch.float32)
    assert set(ours) == set(theirs)
    for name in theirs:
        assert ours.shape(name) == theirs.shape(name), name
        assert torch.equal(ours.get(name), theirs.get(name)), name
    plain = next(name for name in ours if name.endswith("down_proj.weight"))
    a, b = torch.randn(4, ours.shape(plain)[1]), torch.randn(ours.shape(plain)[0], 4)
    written = []
    for kind, weights in (("ours", ours), ("theirs", theirs)):
        out = tmp_path / kind
        out.mkdir()
        shards = write_merged(
            weights, {plain: AdapterPair(a, b, 2.0)}, out, dtype=torch.bfloat16, most_bytes=40_000
        )
        assert sum(merged for _, merged in shards) == 1
        index = json.loads((out / "model.safetensors.index.json").read_text())
        parts = [load_file(out / name) for name in sorted(set(index["weight_map"].values()))]
        written.append({name: tensor for part in parts for name, tensor in part.items()})
    assert written[0].keys() == written[1].keys()
    assert all(torch.equal(written[0][name], written[1][name]) for name in written[0])
