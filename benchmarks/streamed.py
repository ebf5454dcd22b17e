"""A base on the card beside the same base streamed from the host: bits, tokens/s, GiB.

    python benchmarks/streamed.py --model random:llama-70b --tokens 4096,16384 --out FILE

Each line is a measurement: where the base's layers lie, tokens a pass, seconds, the most that torch
allocated. The arms take turns in one process, over the same rows, adapters and kernels. `--gib`
limits what torch may take of the card. `--half-bus` copies each layer twice. `--device cpu` tries
the script out.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from card_limit import GIB, limit_card
from lines import line_writer

from glassloop.base.streamed import load_streamed
from glassloop.config import LoraConfig, ModelConfig
from glassloop.data.batches import build_pass
from glassloop.data.rows import Row
from glassloop.disk.environment import environment
from glassloop.doctor.host_link import gbs
from glassloop.engines.adapters import attach_lora
from glassloop.engines.fused.engine import FusedEngine
from glassloop.engines.fused.stream import LayerStream
from glassloop.engines.norms import fuse_norms
from glassloop.formula.optim import FlatAdapters, l2_norm
from glassloop.plan.support import groups_of
from glassloop.predict.tiers import Tiers


class Twice(LayerStream):
    """Copies each layer twice: a bus of half the speed."""

    def _copy(self, blob: torch.Tensor, slot: int) -> None:
        super()._copy(blob, slot)
        super()._copy(blob, slot)


def rows_of(tokens: int, longest: int, vocabulary: int) -> list[Row]:
    drawn = torch.Generator().manual_seed(tokens)
    lengths = [longest] * (tokens // longest) + ([tokens % longest] if tokens % longest else [])
    return [
        Row(
            f"r{index}",
            tuple(torch.randint(10, vocabulary, (length,), generator=drawn).tolist()),
            tuple(place > length // 5 for place in range(length)),
        )
        for index, length in enumerate(lengths)
    ]


def gradient(engine: FusedEngine, adapters: FlatAdapters, p: Any) -> tuple[float, torch.Tensor]:
    adapters.zero_grad()
    loss_sum, _ = engine(p)
    (loss_sum / p.supervised_tokens).backward()
    return loss_sum.item(), adapters.grad.clone()


def seconds(
    engine: FusedEngine, p: Any, passes: int, begin: Callable[[], Any] = lambda: None
) -> tuple[float, float]:
    """Seconds of a pass, back to back, and the most GiB meanwhile. `begin`: before the clock."""
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    begin()
    started = time.perf_counter()
    for _ in range(passes):
        loss_sum, _ = engine(p)
        (loss_sum / p.supervised_tokens).backward()
    if on_cuda:
        torch.cuda.synchronize()
    took = (time.perf_counter() - started) / max(passes, 1)
    return took, torch.cuda.max_memory_allocated() / GIB if on_cuda else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="random:llama-70b:12")
    parser.add_argument("--tokens", default="4096,16384")
    parser.add_argument("--longest", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--kept", type=int, default=1, help="layers kept whole, as memory.profile")
    parser.add_argument("--bases", default="gpu,host", help="gpu, host")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--gib", type=float, help="what torch may take of the card")
    parser.add_argument("--half-bus", action="store_true")
    parser.add_argument("--deterministic", action="store_true", help="as execution.deterministic")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    on_cuda = asked.device == "cuda"
    device = torch.device("cuda", 0) if on_cuda else torch.device("cpu")
    say = line_writer(asked.out)
    if asked.gib:
        limit_card(asked.gib, device)
    torch.use_deterministic_algorithms(asked.deterministic)
    say(kind="environment", **environment(sys.argv))
    model = ModelConfig(id=asked.model, quantization="nf4")
    for what in ("made", "read"):
        started = time.perf_counter()
        hf, report, pages = load_streamed(
            model,
            groups_of,
            precision="bf16" if on_cuda else "fp32",
            device=device,
            first=contextlib.nullcontext,
        )
        took = time.perf_counter() - started
        say(kind="load", what=what, seconds=took, checksum=report.checksum, notes=report.notes)
        if what == "made":
            pages.close()
            del hf
    started = time.perf_counter()
    fuse_norms(hf)
    peft = attach_lora(hf, LoraConfig(r=16, alpha=16), seed=0, base_name="b", commit=None)
    engine = FusedEngine(peft, report, pages=pages)
    adapters = FlatAdapters(peft.named_parameters())
    drawn = torch.Generator(device).manual_seed(1)
    adapters.flat.data.normal_(0, 0.01, generator=drawn)
    say(kind="engine", seconds=time.perf_counter() - started)
    if on_cuda:
        alone, both_ways = (gbs(pages.blob(0), back=back) for back in (False, True))
        say(kind="link", host_to_card_gbs=alone, host_to_card_both_ways_gbs=both_ways)
    if asked.half_bus:
        engine.stream.__class__ = Twice
    layers, vocabulary = len(engine.layers), engine.head.shape[0]
    for tokens in map(int, asked.tokens.split(",")):
        p = build_pass(
            rows_of(tokens, asked.longest, vocabulary), packed=True, pad_id=0, device=device
        )
        found: dict[str, Any] = {}
        times: dict[str, list[float]] = {}
        for turn in range(asked.turns + 1):
            for base in asked.bases.split(","):
                streamed = layers if base == "host" else 0
                engine.use_tiers(Tiers(asked.kept, "all", streamed=streamed))
                if turn == 0:
                    loss, grad = gradient(engine, adapters, p)
                    again = gradient(engine, adapters, p)[1]
                    apart = float((grad - again).norm() / grad.norm())
                    found[base] = loss, grad.cpu(), apart
                    continue
                gradient(engine, adapters, p)  # what a change of tiers forgot
                one, gib = seconds(engine, p, asked.passes)
                times.setdefault(base, []).append(one)
                say(
                    kind="turn",
                    base=base,
                    tokens=tokens,
                    seconds=one,
                    gib=gib,
                    norm=l2_norm(adapters.grad).item(),
                )
        line: dict[str, Any] = {"kind": "summary", "tokens": tokens, "layers": layers}
        for base, values in times.items():
            line[base] = tokens / statistics.median(values)
            line[f"{base} twice, apart"] = found[base][2]
        if len(times) == 2:
            pairs = [g / h for g, h in zip(times["gpu"], times["host"], strict=True)]
            line["share"], line["shares"] = statistics.median(pairs), pairs
            line["loss equal"] = found["gpu"][0] == found["host"][0]
            line["gradient equal"] = bool(torch.equal(found["gpu"][1], found["host"][1]))
            far = (found["gpu"][1] - found["host"][1]).norm() / found["gpu"][1].norm()
            line["gradient apart"] = float(far)
        say(**line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
