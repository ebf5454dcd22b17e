"""A merged SmolLM2 as GGUF: llama.cpp reads the same prompt ids and writes the same tokens.

Needs llama-cpp-python and, since no wheel carries the converter, its source distribution unpacked:

    pip install llama-cpp-python sentencepiece
    pip download --no-deps --no-binary :all: llama-cpp-python && tar xzf llama_cpp_python-*.tar.gz
    GLASSLOOP_LLAMA_CPP=llama_cpp_python-VERSION/vendor/llama.cpp pytest tests/dist/test_gguf.py
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

SOURCE = os.environ.get("GLASSLOOP_LLAMA_CPP")
QUESTIONS = (
    "Who calls?",
    "Is this a scam? The caller asks for gift cards.",
    "Name a colour.",
    "What is 12 + 30?",
)
NEW_TOKENS = 16


def test_llama_cpp_says_what_transformers_says(tmp_path):
    if SOURCE is None or importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("no llama.cpp: see the head of this file")
    from glassloop.base.smollm2 import smollm2_folder
    from glassloop.use.merge.folder import adds_bos, read_json

    folder = smollm2_folder(tmp_path)
    converter = Path(SOURCE) / "convert_hf_to_gguf.py"
    gguf = tmp_path / "model.gguf"
    paths = os.pathsep.join([str(Path(SOURCE) / "gguf-py"), os.environ.get("PYTHONPATH", "")])
    words = [
        sys.executable,
        str(converter),
        str(folder),
        "--outfile",
        str(gguf),
        "--outtype",
        "f32",
    ]
    done = subprocess.run(
        words, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    import llama_cpp

    server = llama_cpp.Llama(model_path=str(gguf), n_ctx=512, verbose=False, n_threads=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert read_json(folder / "tokenizer_config.json").get("add_bos_token", False) == adds_bos(
        tokenizer
    )
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert server.tokenize(str(text).encode(), add_bos=adds_bos(tokenizer), special=True) == ids
        given = torch.tensor([ids])
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=2,
        )
        wanted = model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), generation_config=settings
        )[0, len(ids) :].tolist()
        server.reset()
        found = []
        for token in server.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
            found.append(token)
            if len(found) == len(wanted):
                break
        assert found == wanted, question
