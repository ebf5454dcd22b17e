"""Commands that serve an adapter or merged weights: vLLM, Ollama."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM's --max-lora-rank admits


def vllm_merged(folder: str, name: str, *, context: int, opens_think: bool) -> str:
    """Chat template, stops and sampling are read from the folder."""
    words = [
        "vllm",
        "serve",
        folder,
        "--served-model-name",
        name,
        "--max-model-len",
        str(context),
        "--generation-config",
        folder,
    ]
    return shlex.join([*words, *(["--reasoning-parser", "deepseek_r1"] if opens_think else [])])


def vllm_adapter(
    base: str,
    revision: str | None,
    adapter: str,
    name: str,
    *,
    r: int,
    nf4: bool,
    context: int,
    opens_think: bool,
) -> str:
    """Serve the base as trained on, with the adapter as LoRA module.

    The chat template is the adapter's.

    nf4: the run trained on NF4, to which vLLM rounds the base while it loads.

    Raises:
        ValueError: r is above 512.
    """
    rank = next((one for one in VLLM_RANKS if one >= r), None)
    if rank is None:
        raise ValueError(
            f"lora.r = {r}: vLLM serves adapters up to r = {VLLM_RANKS[-1]}: merge instead"
        )
    words = [
        "vllm",
        "serve",
        base,
        *(["--revision", revision] if revision else []),
        *(["--quantization", "bitsandbytes"] if nf4 else []),
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
    """Write a request to vLLM's server with the model's own sampling.

    vLLM draws at temperature 1 by default.
    """
    sampling = {"temperature": 0}
    if generation.get("do_sample"):
        names = ("temperature", "top_p", "top_k", "min_p")
        sampling = {key: generation[key] for key in names if generation.get(key) is not None}
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "..."}], **sampling})
    url, kind = "http://localhost:8000/v1/chat/completions", "Content-Type: application/json"
    return shlex.join(["curl", url, "-H", kind, "-d", body])


def commands(
    out: Path,
    checkpoint: Path,
    *,
    base: str,
    revision: str | None,
    r: int,
    trains_tokens: bool,
    nf4: bool,
    generation: dict[str, Any],
    context: int,
    opens_think: bool,
    no_ollama: str | None,
) -> list[str]:
    """Write the lines of SERVE.txt; a # line explains the next.

    Paths are whole, so that a line runs from anywhere.

    Args:
        no_ollama: why there is no Modelfile; None if there is one.
    """
    name = out.name
    shared: dict[str, Any] = dict(context=context, opens_think=opens_think)
    beside = "the adapter beside its base on vLLM" + (
        ", in NF4 as trained (without --quantization: in 16 bits)" if nf4 else ""
    )
    try:
        if trains_tokens:
            raise ValueError("vLLM serves no adapter with trained tokens: merge instead")
        adapter = vllm_adapter(base, revision, str(checkpoint), name, r=r, nf4=nf4, **shared)
    except ValueError as error:
        adapter = str(error)
    return [
        "# merged weights on vLLM",
        vllm_merged(str(out), name, **shared),
        f"# {beside}",
        adapter,
        "# a request",
        request(name, generation),
        "# Ollama",
        no_ollama
        or f"cd {shlex.quote(str(out))} && ollama create {shlex.quote(name)} -f Modelfile",
    ]
