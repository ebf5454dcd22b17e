"""Read-only probes of every adapter matrix in an update.

Norms of its gradient, weight and step, and of the change that they make to the model.

Matrices are taken many at a launch: one at a time, an 8B model's 448 cost the host 122 ms, a third
of a short update (benchmarks/NOTES.md).

Legend: R rank of the adapters, M adapter matrices, K adapted modules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from glassloop.formula.optim import FlatAdapters
from glassloop.record.records import ProbeRecord

ELEMENTS = (
    2**22
)  # of adapters whose products are taken in one launch, from about five copies of them: 80 MiB


@dataclass(frozen=True)
class Before:
    """The part of a probe that is read before the optimizer moves.

    One copy of the adapters is all the memory that a probe holds until then.
    """

    weights: Tensor  # (N,) fp32, a copy of the flat adapters
    grad_norms: Tensor  # (M,) float64, unscaled
    weight_norms: Tensor  # (M,) float64


def read_before(adapters: FlatAdapters, scale: float) -> Before:
    """Begin a probe while `adapters.grad` is g times fp16's loss scale.

    Call it before the gradient is clipped.
    """
    return Before(
        weights=adapters.flat.detach().clone(),
        grad_norms=_norms(adapters, adapters.grad) / scale,
        weight_norms=_norms(adapters, adapters.flat.detach()),
    )


def read_after(
    before: Before,
    adapters: FlatAdapters,
    *,
    update: int,
    applied: bool,
    scale_of: Callable[[str], float],
    attempt: int,
) -> ProbeRecord:
    """Finish a probe after the step, with one read by the host.

    Args:
        scale_of: factor of B A beside a layer's weight, by the layer's whole name.
    """
    names = tuple(map(short_name, adapters.slices))
    pairs = [
        (i, j)
        for i, j in pairwise(range(len(names)))
        if names[i].endswith(".A")
        and names[j] == names[i][:-1] + "B"
        and ".experts." not in names[i]  # A and B of many experts: B A is not their product
    ]
    rows = [before.grad_norms, before.weight_norms]
    if applied:
        step = adapters.flat.detach() - before.weights
        rows.append(_norms(adapters, step))
        rows.append(
            _norms(adapters, step.eq_(0), 1)
        )  # in place, 1 where nothing moved: the sum counts them
        order, deltas = _delta_norms(adapters, before.weights, pairs)
        layers = [layer_of(list(adapters.slices)[pairs[place][0]]) for place in order]
        rows.append(deltas * deltas.new_tensor([scale_of(layer) for layer in layers]))
    widths = [len(row) for row in rows]
    grad, weight, *stepped = (part.tolist() for part in torch.cat(rows).cpu().split(widths))
    update_norm, unmoved_entries, delta = stepped if applied else (None, None, None)
    if delta is not None:
        delta = [norm for _, norm in sorted(zip(order, delta, strict=True))]
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
        all_update_to_weight=math.hypot(*update_norm) / whole
        if update_norm is not None and whole > 0
        else None,
        all_unmoved_share=None if unmoved_entries is None else sum(unmoved_entries) / sum(sizes),
        attempt=attempt,
    )


def layer_of(name: str) -> str:
    """The layer's name in the base, of an adapter matrix's."""
    return name.removeprefix("base_model.model.").partition(".lora_")[0]


def short_name(name: str) -> str:
    """A parameter's name as records have it: layers.0.self_attn.q_proj.A."""
    inner = re.sub(r"^(base_model\.)?(model\.)*", "", name)
    return re.sub(r"\.lora_([AB])(\.default)?\.weight$", r".\1", inner)


def first_nonfinite(adapters: FlatAdapters) -> str | None:
    """Short name of the first adapter matrix that is not finite."""
    for name, place in adapters.slices.items():
        if not bool(torch.isfinite(place.of(adapters.flat.detach())).all()):
            return short_name(name)
    return None


def _norms(adapters: FlatAdapters, flat: Tensor, order: int = 2) -> Tensor:
    """Each matrix's L2 norm, or sum of absolute entries (order 1).

    (M,) float64.
    """
    views = [place.of(flat) for place in adapters.slices.values()]
    return torch.stack(torch._foreach_norm(views, order, torch.float64))  # pyright: ignore[reportPrivateImportUsage]


def _delta_norms(
    adapters: FlatAdapters, before: Tensor, pairs: list[tuple[int, int]]
) -> tuple[list[int], Tensor]:
    """B'A' - BA| of every module, modules of the same shapes together.

    Returns where each stands in `pairs`, and (K,) float64 in that order.

    From products of size (2R, 2R): B'A' - BA = [B', B' - B] [A' - A; A], and |XY|^2 = <X^T X, Y
    Y^T>.
    """
    places, new = list(adapters.slices.values()), adapters.flat.detach()
    alike: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for index, (a, b) in enumerate(pairs):
        alike.setdefault((places[a].shape, places[b].shape), []).append(index)
    order: list[int] = []
    squares = [before.new_zeros(0, dtype=torch.float64)]
    for members in alike.values():
        size = sum(places[matrix].size for matrix in pairs[members[0]])
        together = max(1, ELEMENTS // size)
        for start in range(0, len(members), together):
            some = members[start : start + together]
            a_places, b_places = zip(
                *((places[a], places[b]) for a, b in (pairs[index] for index in some)), strict=True
            )
            a_new, a_old = (
                torch.stack([place.of(flat) for place in a_places]) for flat in (new, before)
            )  # (K, R, in)
            b_new, b_old = (
                torch.stack([place.of(flat) for place in b_places]) for flat in (new, before)
            )  # (K, out, R)
            x = torch.cat([b_new, b_new - b_old], dim=2)  # (K, out, 2R)
            y = torch.cat([a_new - a_old, a_old], dim=1)  # (K, 2R, in)
            squares.append(((x.mT @ x).double() * (y @ y.mT).double()).sum(dim=(1, 2)))
            order += some
    return order, torch.cat(squares).clamp_min(0).sqrt()
