"""A check of the fused engine against the reference engine.

It takes short rows of the run itself. Both engines lie over the same storage. Each computes the
loss and the gradient of every adapter matrix. In fp32 the two must agree. In bf16 both are compared
with the same model computed in fp32, and the fused engine may not lie further from it than the
reference does, up to a factor.

The flat gradient holds the difference of two computations, one added and one subtracted; the true
gradient waits in host memory. Kernels for longer rows are not reached.

Legend: S supervised places, H hidden size, V vocabulary, R rank of the adapters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glassloop.base.checks import logit_factors
from glassloop.base.reading import attention_for
from glassloop.data.batches import build_pass
from glassloop.data.rows import Pass, Row
from glassloop.engines.fused.engine import FusedEngine
from glassloop.engines.peft import PeftEngine, recompute_layers, store_layers
from glassloop.formula.loss import bent
from glassloop.formula.optim import FlatAdapters

TOKENS, PIECE = 64, 16  # of the pass, and of each row in it: several, so that borders count
SEARCHED = 64  # rows that pieces are cut from
HEAD_ROWS = 4096  # of the head, in fp32 at a time: 64 MiB at H = 4096
SHARE = 0.17  # of the adapters beside W x, about: seen in every gradient, and no other model

# Bounds of a matrix's distance from the true gradient, relative to its norm. In fp32 another order
# of summing gave 1e-6 on a CPU and up to 4e-5 on an H200, on drawn models that amplify rounding.
# In bf16 both engines round alike often. On drawn models of twelve kinds fused was at most 1.4
# times as far off as the reference, on the shapes of an 8B 1.06 times; with four labels in all 1.8,
# with one label and r = 1, where nothing averages the rounding, 9.5. The reference's own distance
# is that of the matrix or the median's, whichever is larger.
FP32 = 1e-4
# A drawn gemma2, whose scores are capped, was beyond that for 7 of 100 draws of rows with the first
# adapters, for 12 with the second, and for 1 with both.
FACTOR, AVERAGED = 2.0, 8  # times the reference's distance, with this many labels or more
DRAWS = 3  # of adapters, each of which must show a difference
# A gradient that is 0 (q and k, where attention sees one key) leaves rounding alone, measured
# against the largest matrix.
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1e-4}
LOSS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # relative; bf16 gave 1e-3, one label 4e-3


@dataclass(frozen=True)
class Distances:
    """Losses in nats, and norms by adapter matrix (M,) float64."""

    loss: float  # true
    fused_loss: float
    truth: Tensor  # of the true gradient
    fused: Tensor  # of the fused engine's gradient less the true one
    reference: Tensor  # of the reference's less the true one; 0 in fp32, where it is the truth


def disagreement(
    engine: FusedEngine, adapters: FlatAdapters, rows: Sequence[Row], *, packed: bool, pad_id: int
) -> str:
    """Name where the fused engine differs from the reference; else empty.

    Adapters, their gradients and random numbers are as before when it returns.

    Args:
        rows: of the run, in any order. packed: as the run's passes are; the reference pads.
    """
    device, short = adapters.flat.device, short_rows(rows)
    ours, plain = (
        build_pass(short, packed=one, pad_id=pad_id, device=device) for one in (packed, False)
    )
    return compared(engine, adapters, ours, plain)[0]


def compared(
    engine: FusedEngine, adapters: FlatAdapters, ours: Pass, plain: Pass
) -> tuple[str, Distances]:
    """What differs, "" if nothing does, and by how much.

    In bf16 a difference counts if it is there again with other adapters: rounding alone, of a
    gradient that is mostly rounding, is rarely beyond its bound twice.
    """
    dtype = engine.embedding.dtype
    for seed in range(1 if dtype == torch.float32 else DRAWS):
        with drawn_adapters(engine, adapters, seed), stored_as_least(engine.hf):
            found = distances(engine, adapters, ours, plain)
        said = judged(list(adapters.slices), found, dtype, plain.supervised_tokens)
        if not said:
            break
    return said, found


def short_rows(rows: Sequence[Row]) -> list[Row]:
    """Cut rows with labels to short pieces, the longest first.

    They have TOKENS tokens in all.
    """
    labelled = [row for row in rows[:SEARCHED] if row.supervised_tokens]
    labelled = labelled or [next(row for row in rows if row.supervised_tokens)]
    chosen: list[Row] = []
    for one in sorted(map(piece, labelled), key=len, reverse=True):
        if sum(map(len, chosen)) < TOKENS:
            chosen.append(one)
    return chosen


def piece(row: Row) -> Row:
    """Cut a row to PIECE consecutive tokens, the later half labels.

    If it can be: attention from a label to several tokens is what gives q and k a gradient.
    """
    first = row.supervised.index(True)
    start = max(0, min(first - PIECE // 2, len(row) - PIECE))
    place = slice(start, start + PIECE)
    return Row(row.row_id, row.input_ids[place], (False, *row.supervised[place][1:]))


@contextmanager
def drawn_adapters(engine: FusedEngine, adapters: FlatAdapters, seed: int = 0) -> Iterator[None]:
    """Give A and B small random values for the block.

    B is 0 before update 1, and A would have no gradient. The old values wait in host memory and
    return bit for bit.
    """
    device = adapters.flat.device
    before = adapters.flat.detach().to("cpu", copy=True)
    generator = torch.Generator(device).manual_seed(seed)
    try:
        with torch.no_grad():
            for module in engine.adapted:
                name = module.active_adapters[0]
                a, b = module.lora_A[name].weight, module.lora_B[name].weight
                r, inputs = a.shape
                a.data.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
                size = SHARE / (module.scaling[name] * math.sqrt(r))
                b.data.normal_(0.0, size, generator=generator)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        adapters.flat.data.copy_(before)
        adapters.zero_grad()


@contextmanager
def stored_as_least(hf: nn.Module) -> Iterator[None]:
    """Recompute the reference's layers, so that it needs little memory."""
    base: Any = hf.get_base_model()  # type: ignore[operator]
    recompute_layers(base)
    try:
        yield
    finally:
        store_layers(base)


def distances(engine: FusedEngine, adapters: FlatAdapters, ours: Pass, plain: Pass) -> Distances:
    """Compute rows with each engine, and in fp32 beside bf16 engines.

    Args:
        ours: the rows as the fused engine gets them. plain: the same rows, padded.
    """
    dtype = engine.embedding.dtype
    reference = PeftEngine(engine.hf, engine.report).train()

    def by(one: Any, p: Pass, sign: float) -> float:
        with torch.autocast(p.input_ids.device.type, dtype, enabled=dtype != torch.float32):
            loss_sum, _ = one(p)
        (loss_sum * sign).backward()
        return float(loss_sum.detach())

    def norms() -> Tensor:
        grads = (place.of(adapters.grad) for place in adapters.slices.values())
        return torch.stack([grad.norm() for grad in grads]).double().cpu()

    adapters.zero_grad()
    if dtype == torch.float32:
        loss, truth = by(reference, plain, 1.0), norms()
        fused_loss, fused = by(engine, ours, -1.0), norms()
        return Distances(loss, fused_loss, truth, fused, torch.zeros_like(fused))
    loss, truth = exact(reference, engine.head, plain), norms()
    true_grad = adapters.grad.to("cpu", copy=True)  # or this check would need more than a pass
    fused_loss, fused = by(engine, ours, -1.0), norms()
    adapters.grad.copy_(true_grad)
    by(reference, plain, -1.0)
    return Distances(loss, fused_loss, truth, fused, norms())


def exact(reference: PeftEngine, head: Tensor, p: Pass) -> float:
    """Compute a padded pass in fp32 over the 16-bit storage.

    Its gradient is added as usual. Frozen weights are those that the engines use, NF4 rounded to
    bf16. Only the arithmetic differs.
    """
    factors = logit_factors(reference.hf.config.get_text_config())  # type: ignore[union-attr, operator]
    with computing_in_fp32(reference.hf), torch.autocast(p.input_ids.device.type, enabled=False):
        hidden = reference.hidden_states(p.input_ids).flatten(0, 1)[p.places]  # (S, H)
        labels = p.targets.flatten()[p.places]
        loss, grad = exact_head(hidden.detach(), head, labels, *factors)
        hidden.backward(grad)
    return loss


def exact_head(
    hidden: Tensor, head: Tensor, labels: Tensor, scale: float = 1.0, cap: float | None = None
) -> tuple[float, Tensor]:
    """Summed cross-entropy in fp32 and its gradient in hidden (S, H).

    The head is widened in pieces. scale, cap: between its product and the logits.
    """
    pieces = head.detach().split(HEAD_ROWS)
    logits = torch.cat([hidden @ rows.float().t() for rows in pieces], dim=1)  # (S, V)
    logits, rise = bent(logits, scale, cap)
    own = labels.unsqueeze(1)
    loss = (logits.logsumexp(1, keepdim=True) - logits.gather(1, own)).sum()
    slope = logits.softmax(1).scatter_add_(1, own, logits.new_full(own.shape, -1.0)) * rise
    grad = torch.zeros_like(hidden)
    for columns, rows in zip(slope.split(HEAD_ROWS, dim=1), pieces, strict=True):
        grad += columns @ rows.float()
    return float(loss), grad


@contextmanager
def computing_in_fp32(hf: nn.Module) -> Iterator[None]:
    """Let a 16-bit and NF4 model compute in fp32 for the block."""
    base: Any = hf.get_base_model()  # type: ignore[operator]
    quantised: list[Any] = [m for m in hf.modules() if hasattr(m, "quant_state")]
    dtypes, attention = [m.compute_dtype for m in quantised], base.config._attn_implementation
    widen = base.get_input_embeddings().register_forward_hook(lambda _, __, out: out.float())
    try:
        if attention == "flash_attention_2":  # which has no fp32
            base.config._attn_implementation = attention_for("sdpa", base.config)
        for module in quantised:
            module.compute_dtype = torch.float32
        yield
    finally:
        for module, dtype in zip(quantised, dtypes, strict=True):
            module.compute_dtype = dtype
        base.config._attn_implementation = attention
        widen.remove()


def judged(names: Sequence[str], found: Distances, dtype: torch.dtype, labels: int) -> str:
    """Name the matrix beyond its bound, and the bound; else empty.

    A fault of a layer's backward spoils all layers below it, so among the matrices that are about
    as far off as the worst, the one nearest the loss is named.
    """
    size, far = found.truth, found.fused
    if dtype == torch.float32:
        bound = FP32 * size
    else:
        usual = (found.reference / size).nan_to_num(0.0, 0.0).median()
        bound = torch.maximum(found.reference, usual * size)
        bound = bound * FACTOR * max(1.0, AVERAGED / labels)
    bound = bound + FLOOR[dtype] * size.max()
    beyond = ~(far <= bound)  # NaN is beyond
    off = abs(found.fused_loss - found.loss) / max(found.loss, 1e-6)
    said = []
    if beyond.any():
        ratio = torch.where(beyond, far / bound, 0.0).nan_to_num(math.inf, math.inf)
        place = int((ratio >= ratio.max() / 2).nonzero().max())
        short = names[place].removeprefix("base_model.model.").replace(".default.weight", "")
        said.append(
            f"the gradient of {short} is off by {far[place] / size[place]:.2g} of its norm, "
            f"{bound[place] / size[place]:.2g} is allowed "
            f"({int(beyond.sum())} of {len(names)} matrices are beyond their bound)"
        )
    if not off <= LOSS[dtype]:
        said.append(f"its loss is {found.fused_loss:.6g} nats, the reference's {found.loss:.6g}")
    return "fused does not compute what peft computes: " + "; ".join(said) if said else ""
