"""Two ranks over one base: resident, streamed from the host's one copy, sharded over their cards.

    torchrun --nproc-per-node 2 benchmarks/streamed_ranks.py --model random:llama-70b --out FILE

All ranks compute passes at the same time, so that they share the host's memory and its links. Arms
take turns in one process. In the arm `alone` the first rank streams and the others wait. Each line
is a measurement of all ranks. `host_gib` is the proportional set size of the processes together: a
page that two ranks map counts once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lines import begin_ranks, line_writer
from streamed import GIB, gradient, rows_of, seconds

from glassloop.base.sharded import share_layers
from glassloop.base.streamed import load_streamed
from glassloop.config import LoraConfig, ModelConfig
from glassloop.data.batches import build_pass
from glassloop.disk.environment import environment
from glassloop.engines.adapters import attach_lora
from glassloop.engines.fused.engine import FusedEngine
from glassloop.engines.norms import fuse_norms
from glassloop.formula.dist import gather_objects, one_first
from glassloop.formula.optim import FlatAdapters
from glassloop.plan.support import groups_of
from glassloop.predict.tiers import Tiers


def proportional_gib() -> float:
    """GiB of host memory of this process, shared pages divided by those who map them."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 2**20
    raise RuntimeError("/proc/self/smaps_rollup has no line Pss")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="random:llama-70b")
    parser.add_argument("--tokens", default="4096")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    rank, ranks, device = begin_ranks()
    say = line_writer(asked.out, speaks=rank == 0)
    say(kind="environment", ranks=ranks, **environment(sys.argv))
    started = time.perf_counter()
    hf, report, pages = load_streamed(
        ModelConfig(id=asked.model),
        groups_of,
        precision="bf16",
        device=device,
        first=lambda: one_first(rank == 0),
        locking="must",
    )
    say(
        kind="load",
        seconds=time.perf_counter() - started,
        base_gib=pages.file.manifest.nbytes / GIB,
    )
    fuse_norms(hf)
    peft = attach_lora(hf, LoraConfig(r=16, alpha=16), seed=0, base_name="b", commit=None)
    engine = FusedEngine(peft, report, pages=pages)
    adapters = FlatAdapters(peft.named_parameters())
    adapters.flat.data.normal_(0, 0.01, generator=torch.Generator(device).manual_seed(1))
    layers, vocabulary = len(engine.layers), engine.head.shape[0]
    say(kind="memory", what="host copy", host_gib=gather_objects(proportional_gib()))
    peers: dict[int, torch.Tensor] = {}
    refused = ""
    try:
        share_layers(pages, rank, gather_objects)
        peers, pages.peers = pages.peers, {}
    except ValueError as error:
        refused = str(error)
    say(kind="sharded", refused=refused, notes=pages.notes)
    assert engine.stream is not None
    arms = ("gpu", "alone", "host", *(["sharded"] if peers else []))
    for tokens in map(int, asked.tokens.split(",")):
        rows = rows_of(tokens, 2048, vocabulary)
        p = build_pass(rows, packed=True, pad_id=0, device=device)
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        losses: dict[str, float] = {}
        for turn in range(asked.turns + 1):
            for arm in arms:
                pages.peers = {}
                # Nothing of a pass goes to the host: what lies there is the base.
                engine.use_tiers(Tiers(1, streamed=0 if arm == "gpu" else layers))
                pages.peers = peers if arm == "sharded" else {}
                losses[arm] = gradient(engine, adapters, p)[0]  # and what a change of tiers forgot
                if turn == 0:
                    continue
                passes = 0 if arm == "alone" and rank > 0 else asked.passes
                each = gather_objects(seconds(engine, p, passes, torch.distributed.barrier))
                slowest = max(took for took, _ in each)
                times[arm].append(slowest)
                say(kind="turn", arm=arm, tokens=tokens, seconds=slowest, ranks=each)
        line: dict[str, Any] = {"kind": "summary", "tokens": tokens, "layers": layers}
        for arm, values in times.items():
            working = 1 if arm == "alone" else ranks
            line[arm] = working * tokens / statistics.median(values)
            shares = [g / s for g, s in zip(times["gpu"], values, strict=True)]
            line[f"{arm} of resident"], line[f"{arm} turns"] = statistics.median(shares), shares
            line[f"{arm} loss equal"] = losses[arm] == losses["gpu"]
        line["scaling"] = line["host"] / (ranks * line["alone"])
        say(**line)
    say(kind="memory", what="after passes", host_gib=gather_objects(proportional_gib()))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
