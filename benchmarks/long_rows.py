"""Long rows on small cards: the longest that trains, tokens/s, GiB.

    python benchmarks/long_rows.py --cards 24,12,8 --lengths 16384,32768,65536,longest
        --compare 16384 --out FILE

One process, one large card. Before each case torch is told how much of it there is: the card's
GiB less a CUDA context. So tiers are chosen as on that card, and what does not fit runs out of
memory. Speeds are those of the large card. A case is updates of one row whose every token is
supervised: forward, backward, norm, optimizer. `longest` is the length that `glassloop plan` finds;
if it runs out, a few shorter ones are tried and said. Each line is written as it comes.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import resource
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from card_limit import limit_card
from lines import line_writer

from glassloop.base.streamed import load_streamed
from glassloop.config import PROJECTIONS, LoraConfig, ModelConfig
from glassloop.data.batches import build_pass
from glassloop.data.rows import Pass, Row
from glassloop.disk.environment import environment
from glassloop.engines.adapters import attach_lora
from glassloop.engines.fused.engine import FusedEngine
from glassloop.engines.norms import fuse_norms
from glassloop.formula.optim import FlatAdapters, l2_norm, make_optimizer
from glassloop.loop.launch import grow_segments
from glassloop.plan.support import groups_of
from glassloop.predict.cards import CONTEXT_GIB
from glassloop.predict.choice import Asked, describe
from glassloop.predict.host import spare_bytes
from glassloop.predict.ledger import ledger_of
from glassloop.predict.longest import longest_row, row_of
from glassloop.predict.shapes import Shapes, shapes_of
from glassloop.predict.terms import GIB, Work
from glassloop.predict.tiers import Tiers

SHORTER = (0.96, 0.9)  # of a predicted length that ran out


class Bench:
    """An engine on a card that looks smaller than it is."""

    def __init__(self, model: str, r: int, base: str, device: torch.device):
        found, where = shapes_of(model)
        if found is None:
            raise SystemExit(f"--model {model}: {where}")
        self.shapes: Shapes = found
        self.device, self.base = device, base
        self.precision = "bf16" if device.type == "cuda" else "fp32"
        hf, report, self.pages = load_streamed(
            ModelConfig(id=model, quantization="nf4"),
            groups_of,
            precision=self.precision,
            device=device,
            first=contextlib.nullcontext,
        )
        fuse_norms(hf)
        peft = attach_lora(hf, LoraConfig(r=r, alpha=r), seed=0, base_name="b", commit=None)
        self.engine = FusedEngine(peft, report, pages=self.pages)
        self.adapters = FlatAdapters(peft.named_parameters())
        drawn = torch.Generator(device).manual_seed(1)
        self.adapters.flat.data.normal_(0, 0.01, generator=drawn)
        self.optimizer = make_optimizer(
            "adamw_8bit" if device.type == "cuda" else "sgd",
            self.adapters.flat,
            lr=1e-5,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            weight_decay=0.0,
        )
        self.work = Work(rows=1, tokens=1, r=r, targets=PROJECTIONS, base=base)
        self.work = replace(self.work, precision=self.precision)

    def shrink(self, gib: float) -> None:
        """Leave torch so many GiB of the card."""
        self.engine.use_tiers(Tiers(1, streamed=self.engine.tiers.streamed))
        release()
        self.budget = limit_card(gib, self.device)

    def host_bytes(self, asked: float | None) -> int:
        """Bytes of the host for layers' tensors, as a run counts them."""
        if asked is not None:
            return int(asked * GIB)
        locked = 0 if self.pages.mapped is None else self.pages.file.manifest.nbytes
        mine = self.engine.host.bytes + (self.engine.movable_bytes * self.engine.embedding_away)
        return max(0, spare_bytes() + mine - locked - self.engine.movable_bytes)

    def choose(self, profile: str, tokens: int, host_bytes: int) -> Tiers:
        """Tiers for one row, with room made for them."""
        here = replace(self.engine.tiers, kept=1, host="nothing", held=0, chunk=0)
        self.engine.use_tiers(here)  # gives back what the last case held
        release()
        asked = Asked(profile, tokens, tokens, host_bytes, self.base, longest=tokens)
        tiers = self.engine.choose_tiers(asked)
        self.engine.host.most_bytes = host_bytes
        self.engine.make_room(tiers, tokens)
        self.engine.use_tiers(tiers)
        release()
        return tiers

    def row(self, tokens: int) -> Pass:
        drawn = torch.Generator().manual_seed(tokens)
        ids = torch.randint(10, self.shapes.vocabulary, (tokens,), generator=drawn).tolist()
        row = Row("row", tuple(ids), (False,) + (True,) * (tokens - 1))
        return build_pass([row], packed=True, pad_id=0, device=self.device)

    def update(self, p: Pass) -> tuple[float, float, float]:
        """Seconds, loss in nats and gradient norm of one update."""
        started = time.perf_counter()
        self.adapters.zero_grad()
        loss_sum, _ = self.engine(p)
        (loss_sum / p.supervised_tokens).backward()
        norm = l2_norm(self.adapters.grad).item()
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started, loss_sum.item() / p.supervised_tokens, norm


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def case(
    bench: Bench, profile: str, tokens: int, host_gib: float | None, seconds: float
) -> dict[str, Any]:
    """Train one length: tiers, seconds, GiB; `error` if it did not train."""
    started = time.perf_counter()
    cuda = bench.device.type == "cuda"
    line: dict[str, Any] = {"tokens": tokens, "trained": False}
    try:
        tiers = bench.choose(profile, tokens, bench.host_bytes(host_gib))
        work = replace(row_of(bench.work, tokens), tiers=tiers, profile=profile)
        ledger = ledger_of(bench.shapes, work, "fused")
        line |= {
            "tiers": asdict(tiers),
            "words": describe(tiers, bench.shapes.layers),
            "predicted_gib": ledger.peak_bytes / GIB,
            "host_gib": bench.engine.host.bytes / GIB,
            "prepared_s": time.perf_counter() - started,
        }
        p, times = bench.row(tokens), []
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        while not times or (sum(times) + times[-1] < seconds and len(times) < 4):
            took, line["loss_nats"], line["grad_norm"] = bench.update(p)
            times.append(took)
        line |= {"trained": True, "updates_s": times, "tokens_per_s": tokens / min(times)}
        if cuda:
            line["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
            line["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    except (torch.OutOfMemoryError, ValueError) as error:
        line["error"] = str(error).partition("\n")[0][:300]
    release()
    return line | {"case_s": time.perf_counter() - started}


def compared(bench: Bench, tokens: int) -> list[dict[str, Any]]:
    """Seconds, GiB and gradient of one row by every tier.

    Its gradient is compared with that of the whole pass and everything on the host, whose second
    turn says what is noise.
    """
    found, p, first = [], bench.row(tokens), torch.empty(0)
    streamed = bench.engine.tiers.streamed
    for tiers in (
        Tiers(1, "all", streamed=streamed),
        Tiers(1, "all", streamed=streamed),
        Tiers(0, "all", streamed=streamed, chunk=8192),
        Tiers(0, "attention", streamed=streamed, chunk=8192),
        Tiers(0, "inputs", streamed=streamed, chunk=8192),
        Tiers(0, "inputs", streamed=streamed, chunk=2048),
        Tiers(1, "inputs", streamed=streamed),
    ):
        bench.engine.use_tiers(Tiers(1, streamed=streamed))
        bench.engine.make_room(tiers, tokens)
        bench.engine.use_tiers(tiers)
        release()
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(2):
            started = time.perf_counter()
            bench.adapters.zero_grad()
            loss_sum, _ = bench.engine(p)
            (loss_sum / p.supervised_tokens).backward()
            grad = bench.adapters.grad.cpu()
            times.append(time.perf_counter() - started)
        first = first if len(first) else grad.clone()
        line: dict[str, Any] = {"tokens": tokens, "tiers": asdict(tiers), "seconds": times}
        line["loss_nats"] = loss_sum.item() / p.supervised_tokens
        line["apart"] = float((grad - first).norm() / first.norm())
        if bench.device.type == "cuda":
            line["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        found.append(line)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="random:llama-8b")
    parser.add_argument("--cards", default="24,12,8", help="GB; a card of 24 has 23.5 GiB")
    parser.add_argument("--lengths", default="16384,32768,65536,longest")
    parser.add_argument("--profile", default="fill", choices=("fill", "min"))
    parser.add_argument("--base", default="auto", help="memory.base")
    parser.add_argument("--host-gib", type=float, help="memory.host_gib; without: auto")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20, help="of updates a case, about")
    parser.add_argument("--compare", type=int, help="tokens of a row that every way computes")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    device = torch.device(asked.device, 0) if asked.device == "cuda" else torch.device("cpu")
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text("")

    say = line_writer(asked.out, fresh=False)
    grow_segments()
    say(
        kind="environment",
        **environment(sys.argv),
        host_spare_gib=spare_bytes() / GIB,
        memlock_bytes=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
    )
    started = time.perf_counter()
    bench = Bench(asked.model, asked.r, asked.base, device)
    say(kind="load", seconds=time.perf_counter() - started, notes=bench.pages.notes)
    for line in [] if asked.compare is None else compared(bench, asked.compare):
        say(kind="compare", **line)
    for card in map(float, asked.cards.split(",") if asked.cards else ()):
        bench.shrink(card * 23.5 / 24 - CONTEXT_GIB)
        for length in asked.lengths.split(","):
            tried = [length]
            if length == "longest":
                has = bench.host_bytes(asked.host_gib) / GIB
                work = replace(bench.work, profile=asked.profile, host_gib=has)
                found = longest_row(bench.shapes, work, bench.budget).tokens
                tried = [found, *(int(found * part) // 256 * 256 for part in SHORTER)]
            for tokens in map(int, tried):
                line = case(bench, asked.profile, tokens, asked.host_gib, asked.seconds)
                say(kind="case", card_gb=card, budget_gib=bench.budget / GIB, asked=length, **line)
                if line["trained"]:
                    break
    return 0


if __name__ == "__main__":
    sys.exit(main())
