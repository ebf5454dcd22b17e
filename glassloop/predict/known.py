"""Sizes of models that people train, by name.

Data alone; a run reads the model's own config.json. A name is matched by its words: the owner, and
words of form rather than size (DROPPED), do not count. Rows: family (config.json's model_type),
layers, hidden, intermediate, heads, kv heads, head size, vocabulary, whether the head is tied to
the embedding. Multimodal ones: the language model.
"""

from __future__ import annotations

import re

DROPPED = re.compile(
    r"\d{4}|meta|instruct|it|base|chat|hf|pt|bnb|4bit|unsloth|coder|math|thinking|text|\d+k"
)
Row = tuple[str, int, int, int, int, int, int, int, bool]

LLAMA_8B: Row = ("llama", 32, 4096, 14336, 32, 8, 128, 128256, False)
LLAMA_70B: Row = ("llama", 80, 8192, 28672, 64, 8, 128, 128256, False)
QWEN25_7B: Row = ("qwen2", 28, 3584, 18944, 28, 4, 128, 152064, False)
QWEN25_14B: Row = ("qwen2", 48, 5120, 13824, 40, 8, 128, 152064, False)
QWEN25_32B: Row = ("qwen2", 64, 5120, 27648, 40, 8, 128, 152064, False)
QWEN3_8B: Row = ("qwen3", 36, 4096, 12288, 32, 8, 128, 151936, False)
SMALL_24B: Row = ("mistral", 40, 5120, 32768, 32, 8, 128, 131072, False)
PHI3_MINI: Row = ("phi3", 32, 3072, 8192, 32, 32, 96, 32064, False)

BY_NAME: dict[str, Row] = {
    "llama-3.2-1b": ("llama", 16, 2048, 8192, 32, 8, 64, 128256, True),
    "llama-3.2-3b": ("llama", 28, 3072, 8192, 24, 8, 128, 128256, True),
    "llama-3-8b": LLAMA_8B,
    "llama-3.1-8b": LLAMA_8B,
    "llama-3-70b": LLAMA_70B,
    "llama-3.1-70b": LLAMA_70B,
    "llama-3.3-70b": LLAMA_70B,
    "tinyllama-1.1b": ("llama", 22, 2048, 5632, 32, 4, 64, 32000, False),
    "smollm2-135m": ("llama", 30, 576, 1536, 9, 3, 64, 49152, True),
    "smollm2-360m": ("llama", 32, 960, 2560, 15, 5, 64, 49152, True),
    "smollm2-1.7b": ("llama", 24, 2048, 8192, 32, 32, 64, 49152, True),
    "qwen2.5-0.5b": ("qwen2", 24, 896, 4864, 14, 2, 64, 151936, True),
    "qwen2.5-1.5b": ("qwen2", 28, 1536, 8960, 12, 2, 128, 151936, True),
    "qwen2.5-3b": ("qwen2", 36, 2048, 11008, 16, 2, 128, 151936, True),
    "qwen2.5-7b": QWEN25_7B,
    "qwen2.5-14b": QWEN25_14B,
    "qwen2.5-32b": QWEN25_32B,
    "qwen2.5-72b": ("qwen2", 80, 8192, 29568, 64, 8, 128, 152064, False),
    "qwen3-0.6b": ("qwen3", 28, 1024, 3072, 16, 8, 128, 151936, True),
    "qwen3-1.7b": ("qwen3", 28, 2048, 6144, 16, 8, 128, 151936, True),
    "qwen3-4b": ("qwen3", 36, 2560, 9728, 32, 8, 128, 151936, True),
    "qwen3-8b": QWEN3_8B,
    "qwen3-14b": ("qwen3", 40, 5120, 17408, 40, 8, 128, 151936, False),
    "qwen3-32b": ("qwen3", 64, 5120, 25600, 64, 8, 128, 151936, False),
    "mistral-7b-v0.1": ("mistral", 32, 4096, 14336, 32, 8, 128, 32000, False),
    "mistral-7b-v0.2": ("mistral", 32, 4096, 14336, 32, 8, 128, 32000, False),
    "mistral-7b-v0.3": ("mistral", 32, 4096, 14336, 32, 8, 128, 32768, False),
    "mistral-nemo": ("mistral", 40, 5120, 14336, 32, 8, 128, 131072, False),
    "ministral-8b": ("mistral", 36, 4096, 12288, 32, 8, 128, 131072, False),
    "mistral-small": ("mistral", 56, 6144, 16384, 48, 8, 128, 32768, False),
    "mistral-small-24b": SMALL_24B,
    "mistral-small-3.1-24b": SMALL_24B,
    "mistral-small-3.2-24b": SMALL_24B,
    "gemma-2-2b": ("gemma2", 26, 2304, 9216, 8, 4, 256, 256000, True),
    "gemma-2-9b": ("gemma2", 42, 3584, 14336, 16, 8, 256, 256000, True),
    "gemma-2-27b": ("gemma2", 46, 4608, 36864, 32, 16, 128, 256000, True),
    "gemma-3-270m": ("gemma3_text", 18, 640, 2048, 4, 1, 256, 262144, True),
    "gemma-3-1b": ("gemma3_text", 26, 1152, 6912, 4, 1, 256, 262144, True),
    "gemma-3-4b": ("gemma3_text", 34, 2560, 10240, 8, 4, 256, 262208, True),
    "gemma-3-12b": ("gemma3_text", 48, 3840, 15360, 16, 8, 256, 262208, True),
    "gemma-3-27b": ("gemma3_text", 62, 5376, 21504, 32, 16, 128, 262208, True),
    "phi-3-mini": PHI3_MINI,
    "phi-3.5-mini": PHI3_MINI,
    "phi-3-medium": ("phi3", 40, 5120, 17920, 40, 10, 128, 32064, False),
    "phi-4-mini": ("phi3", 32, 3072, 8192, 24, 8, 128, 200064, True),
    "phi-4": ("phi3", 40, 5120, 17920, 40, 10, 128, 100352, False),
    "deepseek-r1-distill-qwen-1.5b": ("qwen2", 28, 1536, 8960, 12, 2, 128, 151936, False),
    "deepseek-r1-distill-qwen-7b": QWEN25_7B,
    "deepseek-r1-distill-qwen-14b": QWEN25_14B,
    "deepseek-r1-distill-qwen-32b": QWEN25_32B,
    "deepseek-r1-distill-llama-8b": LLAMA_8B,
    "deepseek-r1-distill-llama-70b": LLAMA_70B,
    "deepseek-r1-qwen3-8b": QWEN3_8B,
}


def sizes_by_name(model_id: str) -> Row | None:
    """Sizes of a well-known model by its hub id; else None."""
    words = model_id.rstrip("/").rpartition("/")[2].lower().replace("_", "-").split("-")
    return BY_NAME.get("-".join(word for word in words if not DROPPED.fullmatch(word)))
