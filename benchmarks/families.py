"""`fused` on one card over drawn weights of several families' real shapes: tokens/s, GiB.

    python benchmarks/families.py --out FILE [--only qwen3-8b,gemma-3-12b] [--layers 2]

Each line is a measurement, written as it comes. The model is that of transformers' config; its
linear layers are drawn and quantised one at a time, so that no base is ever whole in 16 bits. Full
rows have 2,048 tokens; short rows have the lengths of scam dialogues, packed. Every model is
compared with `peft` on some 64 tokens before it is timed (engines/fused/proof.py). A model whose
head size two attention kernels can serve is timed with each.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lines import line_writer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from glassloop.base.quantised import LoadReport
from glassloop.base.reading import attention_for, prepare_4bit
from glassloop.bench.workloads import workload
from glassloop.config import LoraConfig
from glassloop.data.batches import build_pass
from glassloop.data.rows import Pass, Row
from glassloop.disk.environment import environment
from glassloop.engines.adapters import attach_lora, linear_names
from glassloop.engines.fused import attention
from glassloop.engines.fused.attention_work import TILES, Tile, Tiles
from glassloop.engines.fused.engine import FusedEngine
from glassloop.engines.fused.proof import disagreement
from glassloop.engines.norms import fuse_norms
from glassloop.formula.optim import FlatAdapters, l2_norm
from glassloop.predict.choice import Asked
from glassloop.predict.tiers import Tiers as Memory

GIB = 2**30
ROPE = {"rope_type": "default", "rope_theta": 1e6}


def sizes(
    layers: int, hidden: int, inner: int, heads: int, keys: int, head: int, words: int
) -> dict[str, Any]:
    names = "num_hidden_layers hidden_size intermediate_size num_attention_heads"
    names += " num_key_value_heads head_dim vocab_size"
    return dict(zip(names.split(), (layers, hidden, inner, heads, keys, head, words), strict=True))


# name -> model_type, its config
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3-8b": ("llama", sizes(32, 4096, 14336, 32, 8, 128, 128256)),
    "qwen3-8b": ("qwen3", sizes(36, 4096, 12288, 32, 8, 128, 151936)),
    "mistral-7b": (
        "mistral",
        sizes(32, 4096, 14336, 32, 8, 128, 32768) | {"sliding_window": None},
    ),
    "gemma-3-12b": (
        "gemma3_text",
        sizes(48, 3840, 15360, 16, 8, 256, 262208)
        | {"sliding_window": 1024, "query_pre_attn_scalar": 256},
    ),
    "llama-3.2-3b": (
        "llama",
        sizes(28, 3072, 8192, 24, 8, 128, 128256) | {"tie_word_embeddings": True},
    ),
    "phi-4": ("phi3", sizes(40, 5120, 17920, 40, 10, 128, 100352)),
}
# Block sizes for heads of 256, tried here alone: within a block's shared memory on Hopper.
WIDE = Tiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2))


def drawn_model(name: str, device: torch.device, layers: int | None, small: bool) -> Any:
    """A base in NF4 with drawn weights, in bf16 on a GPU and fp32 on a CPU."""
    kind, values = MODELS[name]
    values = values | {"pad_token_id": 0, "max_position_embeddings": 8192}
    if layers is not None:
        values["num_hidden_layers"] = layers
    if small:
        values |= {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 1024}
        values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = AutoConfig.for_model(kind, **values)
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention_for("sdpa", config)
        )
    head = hf.get_output_embeddings()
    drawn = torch.Generator(device).manual_seed(0)

    def normal(shape: torch.Size, std: float) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, std, generator=drawn)

    for path, module in list(hf.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            weight = normal(module.weight.shape, module.in_features**-0.5)
            hf.set_submodule(path, quantised(weight, dtype))
    decoder = hf.get_decoder()
    for path, parameter in list(hf.named_parameters()):
        if not parameter.is_meta:
            continue
        owner, _, leaf = path.rpartition(".")
        plain = parameter.ndim > 1
        value = normal(parameter.shape, 0.02) if plain else neutral(parameter, decoder, dtype)
        setattr(hf.get_submodule(owner), leaf, nn.Parameter(value.to(device), False))
    hf.tie_weights()
    decoder.rotary_emb = type(decoder.rotary_emb)(config=config).to(device)
    embedding = hf.get_input_embeddings()
    if hasattr(embedding, "scalar_embed_scale"):
        embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, device=device)
    hf.is_loaded_in_4bit = hf.is_quantized = True
    hf.eval().requires_grad_(False)
    prepare_4bit(hf, dtype)
    return hf


def neutral(parameter: torch.Tensor, decoder: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """A norm's weight that multiplies by 1: 0 where one is added to it."""
    adds = type(decoder.norm).__name__.startswith("Gemma")  # type: ignore[union-attr]
    return torch.full(parameter.shape, 0.0 if adds else 1.0, dtype=dtype)


def quantised(weight: torch.Tensor, dtype: torch.dtype) -> nn.Module:
    """A bitsandbytes layer with double quantisation over `weight` (N, K)."""
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    rows, columns = weight.shape
    codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    make: Any = Params4bit
    meta = torch.device("meta")
    layer: Any = Linear4bit(columns, rows, False, dtype, True, "nf4", device=meta)
    layer.weight = make(
        codes,
        requires_grad=False,
        quant_state=state,
        blocksize=64,
        compress_statistics=True,
        quant_type="nf4",
        module=layer,
        bnb_quantized=True,
    )
    layer.quant_state = state
    return layer


def passes_of(tokens: int, vocabulary: int, device: torch.device, *, short: bool) -> Pass:
    """A packed pass of about `tokens` tokens."""
    longest = min(2048, tokens)
    kind = "scam-v1" if short else "full-v1"
    rows: list[Row] = []
    for row in workload(kind, max(1, tokens // 128), vocabulary=vocabulary):
        cut = Row(row.row_id, row.input_ids[:longest], row.supervised[:longest])
        if sum(map(len, rows)) + len(cut) > tokens:
            break
        rows.append(cut)
    return build_pass(rows, packed=True, pad_id=0, device=device)


def seconds(engine: FusedEngine, p: Pass, adapters: FlatAdapters, repeats: int) -> list[float]:
    """Seconds of each of some passes, forward and backward."""
    found = []
    for _ in range(repeats):
        adapters.zero_grad()
        wait()
        started = time.perf_counter()
        loss_sum, _ = engine(p)
        (loss_sum / p.supervised_tokens).backward()
        wait()
        found.append(time.perf_counter() - started)
    return found


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def kernels_of(engine: FusedEngine) -> list[tuple[str, Tiles | None]]:
    """Attention kernels to time, as (name, block sizes to put in TILES)."""
    size = engine.of.head_size
    own: list[tuple[str, Tiles | None]] = [("chosen", TILES.get(size))]
    return [*own, ("triton", WIDE)] if size == 256 else own


def measure(name: str, asked: argparse.Namespace, device: torch.device, say: Any) -> None:
    """Time one model; a line for each kind of rows and kernel."""
    started = time.perf_counter()
    hf = drawn_model(name, device, asked.layers, asked.small)
    fuse_norms(hf)
    lora = LoraConfig(r=16, alpha=16, targets=linear_names(hf))
    peft = attach_lora(hf, lora, seed=0, base_name=name, commit=None)
    report = LoadReport(name, None, "", 0, None, False, 0.0, ())
    engine = FusedEngine(peft, report)
    adapters = FlatAdapters(peft.named_parameters())
    drawn = torch.Generator(device).manual_seed(1)
    adapters.flat.data.normal_(0, 0.01, generator=drawn)
    vocabulary = engine.head.shape[0]
    wait()
    say(kind="built", model=name, seconds=time.perf_counter() - started, gib=allocated())
    rows = [
        replace(row, input_ids=row.input_ids[:64], supervised=row.supervised[:64])
        for row in workload("scam-v1", 8, vocabulary=vocabulary)
    ]
    rows = [replace(row, supervised=(False,) * 20 + (True,) * 44) for row in rows]
    for kernel, tiles in kernels_of(engine):
        if tiles is not None:
            TILES[engine.of.head_size] = tiles
        try:
            said = disagreement(engine, adapters, rows, packed=True, pad_id=0)
            say(kind="proof", model=name, kernel=kernel, differs=said)
            for short in (False, True):
                p = passes_of(asked.tokens, vocabulary, device, short=short)
                say(model=name, kernel=kernel, **timed(engine, adapters, p, asked, short=short))
        except (RuntimeError, ValueError) as error:
            say(kind="failed", model=name, kernel=kernel, error=f"{error}"[:600])
        finally:
            TILES.pop(256, None)


def timed(
    engine: FusedEngine, adapters: FlatAdapters, p: Pass, asked: argparse.Namespace, *, short: bool
) -> dict[str, Any]:
    """A line of one workload, with memory spent as memory.profile asks."""
    engine.use_tiers(Memory(1))
    tiers = engine.choose_tiers(
        Asked(asked.profile, p.input_ids.numel(), p.supervised_tokens, host_bytes=0)
    )
    engine.use_tiers(tiers)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    first = seconds(engine, p, adapters, 1)[0]
    times = seconds(engine, p, adapters, asked.passes)
    tokens = p.input_ids.numel()
    size = engine.of.head_size
    return {
        "kind": "measured",
        "rows": "scam" if short else "full",
        "tokens": tokens,
        "tiers": asdict(tiers),
        "first_s": first,
        "pass_s": times,
        "tokens_a_s": tokens / statistics.median(times),
        "gib": torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None,
        "attention": attention.choose_kernel(
            p.lengths, engine.embedding.device, engine.embedding.dtype, size
        ),
        "norm": l2_norm(adapters.grad).item(),
    }


def allocated() -> float | None:
    return torch.cuda.memory_allocated() / GIB if torch.cuda.is_available() else None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default=",".join(MODELS), help="names, by comma")
    parser.add_argument("--tokens", type=int, default=16384, help="of a pass")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--layers", type=int, help="of the model, in place of its own")
    parser.add_argument("--profile", default="fill", help="memory.profile: fill, min or GiB")
    parser.add_argument("--small", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    names = asked.only.split(",")
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"--only {unknown[0]}: choose of {', '.join(MODELS)}")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    asked.out.unlink(missing_ok=True)

    say = line_writer(asked.out, fresh=False)
    say(kind="environment", **environment(sys.argv))
    for name in names:
        started = time.perf_counter()
        try:
            measure(name, asked, device, say)
        except (RuntimeError, ValueError) as error:
            say(kind="failed", model=name, error=f"{error}"[:600])
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        say(kind="done", model=name, seconds=time.perf_counter() - started)
    return 0


if __name__ == "__main__":
    sys.exit(main())
