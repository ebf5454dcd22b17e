"""An engine on a card that looks smaller than it is."""

from __future__ import annotations

import contextlib
import gc
import time
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from card_limit import limit_card

from glassloop.base.streamed import load_streamed
from glassloop.config import PROJECTIONS, LoraConfig, ModelConfig
from glassloop.data.batches import build_pass
from glassloop.data.rows import Pass, Row
from glassloop.engines.adapters import attach_lora
from glassloop.engines.fused.engine import FusedEngine
from glassloop.engines.norms import fuse_norms
from glassloop.formula.dist import one_first, reduce_gradients
from glassloop.formula.optim import FlatAdapters, l2_norm, make_optimizer
from glassloop.loop.spending import agreed_tiers
from glassloop.plan.support import groups_of
from glassloop.predict.choice import Asked
from glassloop.predict.host import spare_bytes
from glassloop.predict.shapes import Shapes, shapes_of
from glassloop.predict.terms import GIB, Work
from glassloop.predict.tiers import Tiers


class Bench:
    """The engine, its adapters, and rows that one rank or several compute."""

    def __init__(self, model: str, r: int, base: str, device: torch.device, share: tuple[int, int]):
        """`share`: this rank and the ranks that share each row."""
        self.share = share
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
            first=partial(one_first, share[0] == 0) if share[1] > 1 else contextlib.nullcontext,
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
        self.work = replace(self.work, precision=self.precision, split=share[1])

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
        return max(0, (spare_bytes() - locked) // self.share[1] + mine - self.engine.movable_bytes)

    def choose(
        self, profile: str, tokens: int, host_bytes: int, longest: int | None = None
    ) -> Tiers:
        """Tiers for a pass of `tokens` of all ranks, with room made for them.

        `longest`: tokens of its longest row; None: it is one row.
        """
        here = replace(self.engine.tiers, kept=1, host="nothing", held=0, chunk=0)
        self.engine.use_tiers(here)  # gives back what the last case held
        release()
        own, ranks = -(-tokens // self.share[1]), self.share[1]
        long = tokens if longest is None else longest
        asked = Asked(profile, own, own, host_bytes, self.base, longest=long, split=ranks)
        tiers = agreed_tiers(self.engine, asked, None)
        self.engine.host.most_bytes = host_bytes
        self.engine.make_room(tiers, own)
        self.engine.use_tiers(tiers)
        release()
        return tiers

    def pass_of(self, *lengths: int, whole: bool = False) -> Pass:
        """Rows of these tokens, every one supervised, end to end.

        `whole`: on each rank, though ranks share others.
        """
        drawn = torch.Generator().manual_seed(sum(lengths))
        rows = []
        for number, tokens in enumerate(lengths):
            ids = torch.randint(10, self.shapes.vocabulary, (tokens,), generator=drawn).tolist()
            rows.append(Row(f"row{number}", tuple(ids), (False,) + (True,) * (tokens - 1)))
        share = self.share if self.share[1] > 1 and not whole else None
        return build_pass(rows, packed=True, pad_id=0, device=self.device, share=share)

    def update(self, p: Pass) -> tuple[float, float, float]:
        """Seconds, loss in nats and gradient norm of one update."""
        started = time.perf_counter()
        self.adapters.zero_grad()
        labels = sum(p.lengths) - len(p.lengths)
        loss_sum, _ = self.engine(p)
        (loss_sum / labels).backward()
        reduce_gradients(self.adapters.grad)
        norm = l2_norm(self.adapters.grad).item()
        self.optimizer.step()
        loss = loss_sum.detach()
        if self.share[1] > 1:
            dist.all_reduce(loss)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started, loss.item() / labels, norm


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
