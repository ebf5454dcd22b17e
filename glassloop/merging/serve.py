"""Commands that serve what was trained: vLLM on merged weights, vLLM with the adapter beside its base, Ollama."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM's --max-lora-rank admits


def vllm_merged(folder: str, name: str, *, context: int, opens_think: bool) -> str:
    """Chat template, stops and sampling are read from the folder."""
    words = ["vllm", "serve", folder, "--served-model-name", name, "--max-model-len", str(context), "--generation-config", folder]
    return shlex.join([*words, *(["--reasoning-parser", "deepseek_r1"] if opens_think else [])])


def vllm_adapter(base: str, revision: str | None, adapter: str, name: str, *, r: int, context: int, opens_think: bool) -> str:
    """The base as it was trained on, the adapter as a LoRA module; the chat template is the adapter's. Raises ValueError for r > 512."""
    rank = next((one for one in VLLM_RANKS if one >= r), None)
    if rank is None:
        raise ValueError(f"lora.r = {r}: vLLM serves adapters up to r = {VLLM_RANKS[-1]}: merge instead")
    words = [
        "vllm",
        "serve",
        base,
        *(["--revision", revision] if revision else []),
        "--enable-lora",
        "--max-lora-rank",
        str(rank),
    ]
    words += [
        "--lora-modules",
        f"{name}={adapter}",
        "--tokenizer",
        adapter,
        "--chat-template",
        str(Path(adapter) / "chat_template.jinja"),
    ]
    words += ["--max-model-len", str(context)]
    return shlex.join([*words, *(["--reasoning-parser", "deepseek_r1"] if opens_think else [])])


def request(name: str, generation: dict[str, Any]) -> str:
    """A request to vLLM's server, with the sampling that the model asks for."""
    sampling = "".join(
        f', "{key}": {generation[key]}' for key in ("temperature", "top_p", "top_k") if generation.get(key) is not None
    )
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "..."}}]{sampling}}}'
    return f"curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
