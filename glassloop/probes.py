"""Read-only probes of an update: norms of every adapter matrix's gradient, weight and step, and of the change that they make to the model.

Legend: R rank of the adapters, M adapter matrices, K adapted modules.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from glassloop.optim import FlatAdapters
from glassloop.record import ProbeRecord


@dataclass(frozen=True)
class Before:
    """What has to be read before the optimizer moves. One copy of the adapters is all the memory that a probe takes."""

    weights: Tensor  # (N,) fp32, a copy of the flat adapters
    grad_norms: Tensor  # (M,) float64, unscaled
    weight_norms: Tensor  # (M,) float64


def read_before(adapters: FlatAdapters, scale: float) -> Before:
    """Call it when `adapters.grad` is g of the formula, times fp16's loss scale, and before it is clipped."""
    return Before(
        weights=adapters.flat.detach().clone(),
        grad_norms=_norms(adapters, adapters.grad) / scale,
        weight_norms=_norms(adapters, adapters.flat.detach()),
    )


def read_after(
    before: Before, adapters: FlatAdapters, *, update: int, applied: bool, scaling: float, attempt: int
) -> ProbeRecord:
    """The probe of an update after its step. scaling: alpha / r. One read by the host."""
    names = tuple(map(short_name, adapters.slices))
    pairs = [(i, j) for i, j in pairwise(range(len(names))) if names[i].endswith(".A") and names[j] == names[i][:-1] + "B"]
    rows = [before.grad_norms, before.weight_norms]
    if applied:
        step = adapters.flat.detach() - before.weights
        unmoved = torch.stack([(place.of(step) == 0).sum() for place in adapters.slices.values()])
        deltas = [_delta_norm(adapters, before.weights, i, j) * scaling for i, j in pairs]
        rows += [
            _norms(adapters, step),
            unmoved.double(),
            torch.stack(deltas) if deltas else step.new_zeros(0, dtype=torch.float64),
        ]
    widths = [len(row) for row in rows]
    grad, weight, *stepped = (part.tolist() for part in torch.cat(rows).cpu().split(widths))
    update_norm, unmoved_entries, delta = stepped if applied else (None, None, None)
    sizes = [place.size for place in adapters.slices.values()]
    whole = math.hypot(*weight)
    return ProbeRecord(
        update=update,
        applied=applied,
        matrices=names,
        grad_norm=tuple(grad),
        weight_norm=tuple(weight),
        update_norm=None if update_norm is None else tuple(update_norm),
        update_to_weight=None
        if update_norm is None
        else tuple(u / w if w > 0 else None for u, w in zip(update_norm, weight, strict=True)),
        unmoved_share=None
        if unmoved_entries is None
        else tuple(n / size for n, size in zip(unmoved_entries, sizes, strict=True)),
        modules=tuple(names[i][:-2] for i, _ in pairs),
        delta_norm=None if delta is None else tuple(delta),
        all_update_to_weight=math.hypot(*update_norm) / whole if update_norm is not None and whole > 0 else None,
        all_unmoved_share=None if unmoved_entries is None else sum(unmoved_entries) / sum(sizes),
        attempt=attempt,
    )


def short_name(name: str) -> str:
    """base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight -> layers.0.self_attn.q_proj.A"""
    inner = re.sub(r"^(base_model\.)?(model\.)*", "", name)
    return re.sub(r"\.lora_([AB])(\.default)?\.weight$", r".\1", inner)


def first_nonfinite(adapters: FlatAdapters) -> str | None:
    """Short name of the first adapter matrix with an entry that is not finite."""
    for name, place in adapters.slices.items():
        if not bool(torch.isfinite(place.of(adapters.flat.detach())).all()):
            return short_name(name)
    return None


def _norms(adapters: FlatAdapters, flat: Tensor) -> Tensor:
    """(M,) float64: each matrix's L2 norm."""
    views = [place.of(flat) for place in adapters.slices.values()]
    return torch.stack(torch._foreach_norm(views, 2, torch.float64))  # pyright: ignore[reportPrivateImportUsage]


def _delta_norm(adapters: FlatAdapters, before: Tensor, a: int, b: int) -> Tensor:
    """() float64: |B'A' - BA|, from products of size (2R, 2R): B'A' - BA = [B', B' - B] [A' - A; A], and |XY|^2 = <X^T X, Y Y^T>."""
    places = list(adapters.slices.values())
    a_new, b_new = places[a].of(adapters.flat.detach()), places[b].of(adapters.flat.detach())  # (R, in), (out, R)
    a_old, b_old = places[a].of(before), places[b].of(before)
    x = torch.cat([b_new, b_new - b_old], dim=1)  # (out, 2R)
    y = torch.cat([a_new - a_old, a_old])  # (2R, in)
    squared = ((x.T @ x).double() * (y @ y.T).double()).sum()
    return squared.clamp_min(0).sqrt()
