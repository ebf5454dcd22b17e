"""The tiny Llama, tokenizer and rows of `glassloop verify`.

There is no download and no torch.

Weights come from Python's own generator, which is the same everywhere: numbers of two versions of
any library may be compared.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import safetensors.numpy

from glassloop.data.rows import Row

if TYPE_CHECKING:
    from glassloop.loop.run import Run

# raised when the code below draws or hardens otherwise; what constants say is part of problem_id()
# by itself
FORM = 1
# Of everything that is drawn. Under this one gradient noise of rounding's size (2.5e-7) moves
# AdamW8bit's change by 2e-4 at most, in 48 tries;
# under others by up to 4e-3, where a number lies so near the edge of an 8-bit level that rounding
# pushes it over.
SEED = "8"
# 8 rows an update: two full windows and one of 3, which leaves a rank of the layout 2 x 4 x 1
# without rows
ROWS = 19
UPDATES = 5  # the third is the tail window; the fourth begins the second epoch
WARMUP_UPDATES = 2
# By optimizer; under a smaller one SGD's change is little above the rounding of the weights.
PEAK_LR = {"sgd": 0.3, "adamw_8bit": 1e-2}
MAX_TOKENS = 96
LORA_R, LORA_ALPHA = 4, 8

SPECIALS = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")  # ids 0 .. 5
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = [
    "a",
    "caller",
    "asks",
    "for",
    "the",
    "code",
    "and",
    "nobody",
    "can",
    "check",
    "it",
    "so",
    "we",
    "hang",
    "up",
    "now",
]
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": len(SPECIALS) + 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}


@dataclass(frozen=True)
class Task:
    """The content of a computation; its way is a member's own affair."""

    quantization: str  # form of the frozen base: "nf4" | "none"
    max_grad_norm: float | None


TASKS = {
    "nf4": Task("nf4", None),
    "plain": Task("none", None),
    "clipped": Task("none", 0.3),  # a single micro-batch's share is above
}


def problem_id() -> str:
    """12 hex digits of model, rows and updates: only equal ones compare."""
    said = (
        FORM,
        SEED,
        ROWS,
        UPDATES,
        WARMUP_UPDATES,
        PEAK_LR,
        MAX_TOKENS,
        LORA_R,
        LORA_ALPHA,
        CHAT_TEMPLATE,
        WORDS,
        LLAMA,
        TASKS,
    )
    return hashlib.sha256(repr(said).encode()).hexdigest()[:12]


def drawn(name: str, shape: tuple[int, ...], half_width: float) -> numpy.ndarray:
    """fp32 array, uniform in (-half_width, half_width), a function of its arguments alone."""
    generator = random.Random(f"{SEED} {name}")
    values = [generator.uniform(-half_width, half_width) for _ in range(prod(shape))]
    return numpy.array(values, dtype=numpy.float32).reshape(shape)


def write_model(folder: Path) -> Path:
    """Write the tiny Llama with its tokenizer, as a hub does.

    Returns the folder.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    safetensors.numpy.save_file(_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(
            vocab={text: place for place, text in enumerate([*SPECIALS, *letters])}, merges=[]
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names})
    )
    return folder


def _weights() -> dict[str, numpy.ndarray]:
    hidden, wide, vocabulary = LLAMA["hidden_size"], LLAMA["intermediate_size"], LLAMA["vocab_size"]
    keys = LLAMA["num_key_value_heads"] * LLAMA["head_dim"]
    shapes = {
        "model.embed_tokens": (vocabulary, hidden),
        "lm_head": (vocabulary, hidden),
        "model.norm": (hidden,),
    }
    for layer in range(LLAMA["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{layer}.{name}": shape
            for name, shape in {
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.k_proj": (keys, hidden),
                "self_attn.v_proj": (keys, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "mlp.gate_proj": (wide, hidden),
                "mlp.up_proj": (wide, hidden),
                "mlp.down_proj": (hidden, wide),
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
            }.items()
        }
    # Uniform of half width sqrt(3) s has standard deviation s; norms lie about 1.
    return {
        f"{name}.weight": drawn(name, shape, 0.173) + numpy.float32(len(shape) == 1)
        for name, shape in shapes.items()
    }


def write_rows(path: Path) -> Path:
    """Write a jsonl file of ragged prompts and completions; return its path.

    Some are longer than MAX_TOKENS and will be cut.
    """
    generator = random.Random(5)
    lines = [
        {
            "prompt": " ".join(generator.choices(WORDS, k=low)),
            "completion": " ".join(generator.choices(WORDS, k=high)),
        }
        for low, high in ((generator.randint(1, 18), generator.randint(1, 9)) for _ in range(ROWS))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def harden(run: Run) -> None:
    """Make a fresh run's rows hard and its adapters alive.

    Some rows keep a single label; the window of update 1 has none on rank 1 of the layout 2 x 2 x
    2. Fresh B is 0, and then the gradient of A is 0 too: both get values.
    """
    import torch

    for name, place in run.replica.adapters.slices.items():
        place.of(run.replica.adapters.flat.data).copy_(
            torch.from_numpy(drawn(name, place.shape, 0.087))
        )
    first = run.batches.window(1).rows
    bare = {first[place] for place in (2, 3, 6, 7)}
    rows = []
    for index, row in enumerate(run.batches.rows):
        supervised = row.supervised
        if index in bare:
            supervised = (False,) * len(row)
        elif index % 7 == 3:
            supervised = (False,) * (len(row) - 1) + (True,)
        rows.append(Row(row.row_id, row.input_ids, supervised))
    run.batches = replace(run.batches, rows=tuple(rows))
    contract = getattr(run, "contract", None)
    if contract is not None:  # the run is held to the labels that it has now
        counted = (
            run.batches.supervised_tokens(run.batches.window(u)) for u in range(1, UPDATES + 1)
        )
        run.contract = replace(contract, supervised_tokens=tuple(counted))
