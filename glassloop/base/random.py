"""Models with drawn weights, for timing without a download.

`model.id=random:llama-8b` has the shapes of DeepSeek-R1-Distill-Llama-8B, `random:tiny` two small
layers. Every weight is a function of its name and place, in integer arithmetic, so a CPU and any
card draw the same bits. Only a config and a tokenizer lie on disk. Weights are made where they are
needed, one layer at a time.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glassloop.disk.cache import published
from glassloop.predict.shapes import KNOWN, Shapes, known_shapes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PREFIX = "random:"
VERSION = 1  # of the drawn weights and the tokenizer: a change of either raises it
SPECIALS = (
    "<unk>",
    "<s>",
    "</s>",
    "<pad>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<r7>",
    "<r8>",
    "<r9>",
)  # ids 0 .. 9
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHUNK = 1 << 24  # weights drawn at a time: some 0.5 GiB of integers
BYTES_MEAN, BYTES_STD = 510.0, 147.8016  # of the sum of four independent bytes


def sizes() -> dict[str, Shapes]:
    """Name after the prefix -> shapes."""
    return {
        name.removeprefix(PREFIX): shapes
        for name, shapes in KNOWN.items()
        if name.startswith(PREFIX)
    }


def drawn_shapes(name: str) -> Shapes:
    """Shapes of `random:NAME` or `random:NAME:LAYERS`. Raises ValueError for an unknown one."""
    found = known_shapes(PREFIX + name)
    if found is None:
        there = ", ".join(PREFIX + known for known in sizes())
        raise ValueError(
            f"model.id = {PREFIX}{name} is unknown: there are {there}, each also with :LAYERS"
        )
    return found


def random_folder(model_id: str, cache: Path) -> Path:
    """Folder with config.json and tokenizer of `random:NAME`.

    It is made under `cache` at the first call. Raises ValueError for an unknown NAME.
    """
    name = model_id.removeprefix(PREFIX)
    shapes = drawn_shapes(name)
    folder = cache / f"random-{name.replace(':', '-')}-v{VERSION}"
    if not folder.is_dir():
        with published(folder) as temporary:
            _config(shapes).save_pretrained(temporary)
            _tokenizer(shapes.vocabulary).save_pretrained(temporary)
    return folder


def _config(shapes: Shapes) -> Any:
    from transformers import LlamaConfig

    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return LlamaConfig(
        vocab_size=shapes.vocabulary,
        hidden_size=shapes.hidden,
        intermediate_size=shapes.intermediate,
        num_hidden_layers=shapes.layers,
        num_attention_heads=shapes.heads,
        num_key_value_heads=shapes.kv_heads,
        head_dim=shapes.head_dim,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **scaling},
        tie_word_embeddings=shapes.tied_head,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerBase:
    """A tokenizer of bytes, ten special tokens and unused names.

    No text contains the names; they fill the vocabulary.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*SPECIALS, *alphabet]
    names += [f"<filler {number}>" for number in range(len(names), vocabulary)]
    tokenizer = Tokenizer(
        models.BPE({name: number for number, name in enumerate(names)}, [], unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in SPECIALS]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def drawn(name: str, shape: tuple[int, ...], hidden: int, device: torch.device) -> torch.Tensor:
    """The weight called `name`: bf16, about normal, the same on every device.

    Its standard deviation is 1.28 / sqrt(hidden).
    """
    import torch

    seed, size = zlib.crc32(name.encode()), 1
    for extent in shape:
        size *= extent
    result = torch.empty(size, dtype=torch.bfloat16, device=device)
    factor = 1.28 / hidden**0.5 / BYTES_STD
    for start in range(0, size, CHUNK):
        mixed = torch.arange(start, min(start + CHUNK, size), device=device)  # int64
        mixed = _mix(_mix(mixed + 0x9E3779B) ^ seed)
        total = (mixed & 255) + (mixed >> 8 & 255) + (mixed >> 16 & 255) + (mixed >> 24)
        result[start : start + CHUNK] = (total.float() - BYTES_MEAN) * factor
    return result.view(shape)


def _mix(values: torch.Tensor) -> torch.Tensor:
    """Mix integers below 2^32: two rounds of shift, xor and multiplication."""
    for _ in range(2):
        values = (values ^ values >> 16) * 0x45D9F3B & 0xFFFFFFFF  # below 2^59: no overflow
    return values ^ values >> 16


def weights_of(
    shapes: Shapes, device: torch.device
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield all weights in bf16, in parts of about a layer.

    Each is (part's name, {name in the model: weight}).
    """
    import torch

    h = shapes.hidden
    ones = torch.ones(h, dtype=torch.bfloat16, device=device)
    yield (
        "ends",
        {
            "model.embed_tokens.weight": drawn("embed", (shapes.vocabulary, h), h, device),
            "model.norm.weight": ones,
            **(
                {}
                if shapes.tied_head
                else {"lm_head.weight": drawn("head", (shapes.vocabulary, h), h, device)}
            ),
        },
    )
    for layer in range(shapes.layers):
        own = f"model.layers.{layer}"
        part = {
            f"{own}.input_layernorm.weight": ones.clone(),
            f"{own}.post_attention_layernorm.weight": ones.clone(),
        }
        for target, (inner, outer) in shapes.projections.items():
            block = "self_attn" if target in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            part[f"{own}.{block}.{target}.weight"] = drawn(
                f"{layer}.{target}", (outer, inner), h, device
            )
        yield f"layer-{layer:03d}", part


def write_nf4(
    folder: Path,
    source: Path,
    shapes: Shapes,
    *,
    quantization: dict[str, Any],
    double: bool,
    dtype: Any,
    device: Any,
) -> None:
    """Write the model into `folder` in NF4, one layer at a time.

    The files are as transformers would save them. Layers are drawn and quantised on `device`.

    Args:
        source: folder of `random_folder`. quantization: what config.json says of it. dtype: of
            what stays unquantised.
    """
    import bitsandbytes.functional as bnb
    from safetensors.torch import save_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source)
    config.quantization_config, config.dtype = quantization, dtype
    config.save_pretrained(folder)
    places: dict[str, str] = {}
    total = 0
    for name, part in weights_of(shapes, device):
        tensors: dict[str, Any] = {}
        for key, weight in part.items():
            if not key.endswith("_proj.weight"):
                tensors[key] = weight.to(dtype)
                continue
            packed, state = bnb.quantize_4bit(
                weight.to(dtype), blocksize=64, quant_type="nf4", compress_statistics=double
            )  # (in * out / 2, 1) uint8
            tensors[key] = packed
            tensors |= {
                f"{key}.{what}": value for what, value in state.as_dict(packed=True).items()
            }
        tensors = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        file = f"{name}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def fill(hf: PreTrainedModel, shapes: Shapes, device: torch.device) -> None:
    """Put the drawn weights into an unquantised model, in its own dtype."""
    import torch

    parameters = dict(hf.named_parameters())
    with torch.no_grad():
        for _, part in weights_of(shapes, device):
            for key, weight in part.items():
                parameters[key].copy_(weight)
