"""A peer on several cards: torch's FSDP2 over PEFT's QLoRA, 70B shapes, drawn weights.

    torchrun --nproc-per-node 2 benchmarks/fsdp_qlora.py --layers 80 --out FILE [--offload]

It is what Accelerate's FSDP plugin builds: 4-bit weights stored as bf16, adapters in bf16, one
shard group a decoder layer, recomputed activations. Each rank computes the same passes as
streamed_ranks.py: rows of 2,048 tokens, forward and backward, all ranks at once. With --offload
the shards wait in page-locked host memory. Rank 0 writes the lines.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from lines import begin_ranks, line_writer
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from glassloop.config import PROJECTIONS
from glassloop.disk.environment import environment

GIB = 2**30
SIZES = {  # of Llama 3 70B, and of a model for a CPU
    "70b": (8192, 28672, 64, 8, 128256),
    "tiny": (256, 512, 4, 2, 512),
}


def model_of(size: str, layers: int, device: torch.device) -> Any:
    """QLoRA over drawn weights, quantised one at a time."""
    hidden, inner, heads, keys, words = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        vocab_size=words,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
        model.to(torch.bfloat16)
    for path, module in list(model.named_modules()):
        name = path.rpartition(".")[2]
        if name in PROJECTIONS:
            model.set_submodule(path, quantised(module, device))
        elif name in ("embed_tokens", "lm_head"):
            drawn = torch.randn(module.weight.shape, dtype=torch.bfloat16, device=device) * 0.02
            module.weight = torch.nn.Parameter(drawn)
        elif name == "norm" or name.endswith("layernorm"):
            ones = torch.ones(module.weight.shape, dtype=torch.bfloat16, device=device)
            module.weight = torch.nn.Parameter(ones)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    model.tie_weights()
    model.is_loaded_in_4bit = True
    found = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=list(PROJECTIONS)))
    for p in found.parameters():
        if p.requires_grad:
            p.data = p.data.to(device, torch.bfloat16)
    return found


def quantised(module: torch.nn.Linear, device: torch.device) -> Any:
    """A 4-bit layer stored as bf16, which FSDP can shard."""
    shape = module.out_features, module.in_features
    drawn = torch.randn(shape, dtype=torch.bfloat16, device=device) * 0.02
    how: dict[str, Any] = dict(quant_type="nf4", compress_statistics=True)
    how["quant_storage"] = torch.bfloat16
    with torch.device("meta"):  # or it would draw weights on the CPU first
        layer: Any = Linear4bit(shape[1], shape[0], False, torch.bfloat16, **how)
    make_weight: Any = Params4bit
    layer.weight = make_weight(drawn, requires_grad=False, module=layer, **how)
    return layer.to(device)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", default="70b", choices=SIZES)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--rows", type=int, default=2, help="rows of a pass")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    rank, ranks, device = begin_ranks()
    on_cuda = device.type == "cuda"
    say = line_writer(asked.out, speaks=rank == 0)
    say(kind="environment", ranks=ranks, **environment(sys.argv))
    started = time.perf_counter()
    model = model_of(asked.size, asked.layers, device)
    base = model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    policy = CPUOffloadPolicy() if asked.offload else OffloadPolicy()
    for layer in base.model.layers:
        fully_shard(layer, offload_policy=policy)
    fully_shard(base, offload_policy=policy)
    say(kind="load", seconds=time.perf_counter() - started)
    words = SIZES[asked.size][-1]
    ids = torch.randint(5, words, (asked.rows, asked.tokens), device=device)
    times = []
    for turn in range(asked.passes + 1):
        if on_cuda:
            torch.cuda.synchronize()
            if turn == 1:
                torch.cuda.reset_peak_memory_stats()
        torch.distributed.barrier()
        started = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if on_cuda:
            torch.cuda.synchronize()
        if turn:
            times.append(time.perf_counter() - started)
            peak = torch.cuda.max_memory_allocated() / GIB if on_cuda else 0.0
            say(kind="turn", seconds=times[-1], loss=loss.item(), gib=peak, offload=asked.offload)
        model.zero_grad(set_to_none=True)
    rate = ranks * asked.rows * asked.tokens / statistics.median(times)
    say(kind="summary", layers=asked.layers, offload=asked.offload, tokens_per_s=rate)
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
