"""GPU memory of a run by phase, from shapes alone.

Each term is counted from what the code of an engine keeps alive. A phase's number is the most that
torch's allocator holds at once during it (`torch.cuda.max_memory_allocated`), in the steady state:
the optimizer's state exists. What lies outside of it (CUDA context, fragmentation, NCCL's buffers)
is added where a card is judged (cards.py).

Legend: H hidden size, I intermediate size, V vocabulary, L layers, N trainable parameters, P places
of a pass (rows x tokens, padding included), S supervised places of a pass, a bytes of an activation
(2; 4 in fp32).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from glassloop.predict import chunks, tiers
from glassloop.predict.shapes import Shapes
from glassloop.predict.terms import (
    HEAD_CHUNK,
    NF4_BLOCK,
    PHASES,
    Ledger,
    Term,
    Work,
    resident,
    tiers_of,
)
from glassloop.predict.tiers import Sizes, Tiers, sizes_of


def ledger_of(shapes: Shapes, work: Work, engine: str = "peft") -> Ledger:
    """Bytes by phase for an engine that has a profile here.

    Raises ValueError for another engine, or unknown targets.
    """
    if engine not in PROFILES:
        raise ValueError(
            f"execution.engine = {engine}: no memory profile; there is one for "
            f"{', '.join(PROFILES)}"
        )
    terms = (*resident(shapes, work), *PROFILES[engine](shapes, work))
    return Ledger(engine, tuple(term for term in terms if term.size_bytes))


def _peft(shapes: Shapes, work: Work) -> tuple[Term, ...]:
    """transformers + PEFT + bitsandbytes."""
    if shapes.traits.capped and work.attention == "sdpa":
        work = replace(work, attention="eager")  # base/reading.py says the same of the run
    a, places, hidden, layers = work.act, work.places, shapes.hidden, shapes.layers
    cast = work.precision != "fp32"  # autocast is on
    adapters_16 = (
        a * shapes.lora_weights(work.r, work.targets) if cast else 0
    )  # autocast's copies, kept until the pass leaves it
    stored = stored_bytes(shapes, work)
    trained = a * shapes.embedding_weights if work.trained_tokens else 0
    flows = ("forward", "logits", "backward")
    terms = [
        Term("ids, targets, positions and owners", tiers.index_bytes(places), flows),
        Term("cosines and sines", 2 * a * work.tokens * shapes.head_dim, flows),
        # A packed pass brings a block-diagonal mask: bool, and the kernel's copy of it.
        Term(
            "mask of the packed pass",
            (1 + a) * work.tokens**2 if work.packed and work.attention == "sdpa" else 0,
            flows,
        ),
        Term("inputs of all layers", layers * places * hidden * a, flows),
        Term("16-bit copies of the adapters", adapters_16, ("forward", "logits")),
        Term("forward: buffers of a layer", _forward_buffers(shapes, work), ("forward",)),
        Term("output of the last layer, and its norm's", 2 * places * hidden * a, ("logits",)),
        Term(
            "supervised places: hidden states and their gradient",
            2 * work.supervised * hidden * a,
            ("logits",),
        ),
        Term("logits of a chunk", head_bytes(shapes, work), ("logits",)),
        # PEFT copies the embedding to put trained rows into it; its gradient has the same size.
        Term("embedding with its trained rows", trained, flows),
        Term("its gradient", trained, ("backward",)),
        Term("backward: gradient of a layer's output", places * hidden * a, ("backward",)),
        Term("backward: buffers of a layer", _backward_buffers(shapes, work), ("backward",)),
    ]
    if work.checkpointing:
        terms.append(Term("stored by the layer that is recomputed", stored, ("backward",)))
        terms.append(Term("16-bit copies of its adapters", adapters_16 // layers, ("backward",)))
    else:
        terms.append(Term("stored by all layers", layers * stored, flows))
        terms.append(Term("16-bit copies of the adapters, stored", adapters_16, ("backward",)))
    return tuple(terms)


def stored_bytes(shapes: Shapes, work: Work) -> int:
    """Bytes that one layer of `peft` keeps for its backward pass.

    Its input is not counted. Counted from autograd's saved tensors: a LoRA matrix keeps its input,
    an RMS norm its input and 1 / rms, attention its q, k, v, output and log-sum-exp, SwiGLU gate,
    silu(gate) and up. bitsandbytes keeps no activation. Beside unquantised weights PEFT casts x to
    fp32 for each projection and autocast casts it back, so every adapter keeps a copy of its own.
    """
    hidden, inner, targets = shapes.hidden, shapes.intermediate, set(work.targets)
    copies = work.quantization == "none" and work.precision != "fp32"
    into_attention, into_mlp = (
        len(targets & {"q_proj", "k_proj", "v_proj"}),
        len(targets & {"gate_proj", "up_proj"}),
    )
    if not copies:  # the adapters share one normed input
        into_attention, into_mlp = min(into_attention, 1), min(into_mlp, 1)
    elements = (
        into_attention * hidden
        + shapes.q_width + 2 * shapes.kv_width  # q, k, v
        + shapes.q_width  # attention's output
        + (shapes.q_width if copies and "o_proj" in targets else 0)
        + hidden  # input of the second norm
        + into_mlp * hidden
        + 3 * inner  # gate, silu(gate), up
        + (inner if "down_proj" in targets else 0)  # their product
        + work.r * len(targets)  # x A^T
    )  # fmt: skip
    fp32 = 4 * shapes.heads + 2 * 4  # log-sum-exp, 1 / rms of two norms
    capped = work.act if shapes.traits.capped else 0  # the tangent of a score
    scores = (
        (6 + capped) * shapes.heads * work.tokens if work.attention == "eager" else 0
    )  # softmax in fp32, and rounded
    return work.places * (elements * work.act + fp32 + scores)


def head_bytes(shapes: Shapes, work: Work) -> int:
    """Logits of a chunk, twice, and the gradient of its hidden states.

    The logits are in the weight's type and in fp32.
    """
    rounded = 0 if work.precision == "fp32" else work.act
    chunk = min(work.supervised, HEAD_CHUNK)
    return chunk * (4 + rounded) * shapes.vocabulary + chunk * shapes.hidden * work.act


def _dequantized(shapes: Shapes, work: Work, scale_copies: int) -> int:
    """The largest weight in 16 bits, and its scales in fp32.

    Only one is dequantised at a time.
    """
    if work.quantization != "nf4":
        return 0
    n = shapes.intermediate * shapes.hidden
    return n * work.act + (scale_copies * 4 * n // NF4_BLOCK if work.double_quantization else 0)


def _forward_buffers(shapes: Shapes, work: Work) -> int:
    """Most that a layer's MLP holds beside its input, in forward.

    Recomputed layers: input of the second norm and its output, silu(gate), and for `up` three of
    four at a time: base output, adapter's output, that scaled, their sum; or the dequantised weight
    instead of two of them. Stored layers: only the last projection is extra.
    """
    a, hidden, inner, places = work.act, shapes.hidden, shapes.intermediate, work.places
    x_fp32 = (
        4 if work.quantization == "none" and work.precision != "fp32" else 0
    )  # bytes: PEFT's fp32 copy of x, beside unquantised weights
    if work.checkpointing:
        adding = 4 * inner * a + x_fp32 * hidden
        multiplying = 2 * inner * a
        return places * 2 * hidden * a + max(
            places * adding, places * multiplying + _dequantized(shapes, work, 2)
        )
    adding = 3 * hidden * a + x_fp32 * inner + (inner * a if x_fp32 else 0)
    return max(places * adding, places * hidden * a + _dequantized(shapes, work, 2))


def _backward_buffers(shapes: Shapes, work: Work) -> int:
    """Most that a layer's backward pass needs beside what is stored.

    It is in its MLP, at the product of silu(gate) and up. NF4: the product is freed; its gradient
    through the adapter and through the base (which dequantises), then the gradients of both
    factors. Unquantised: at the end of the recomputation the product, its fp32 copy and three
    tensors of the layer's output; or the gradients in fp32.
    """
    a, hidden, inner, places = work.act, shapes.hidden, shapes.intermediate, work.places
    if work.quantization == "nf4" or work.precision == "fp32":
        return max(places * inner * a + _dequantized(shapes, work, 1), places * 2 * inner * a)
    if work.checkpointing:
        return places * (3 * inner + 3 * hidden) * a
    return places * 2 * inner * a


def _fused(shapes: Shapes, work: Work) -> tuple[Term, ...]:
    """Memory of `fused`.

    A layer's share is in tiers.py, where the engine's own choice of tiers comes from.
    """
    a, places, layers = work.act, work.places, shapes.layers
    one, chosen = sizes_of(shapes, work.r, work.targets, a), tiers_of(shapes, work)
    flows, run = ("forward", "logits", "backward"), PHASES[2:]
    recomputed = layers - chosen.kept
    # Of a layer: what is brought back from the host when it is at work, and what stays.
    away, stays = tiers.away_bytes(one, places, chosen.host), tiers.input_bytes(one, places)
    if chosen.host != "nothing":
        stays = tiers.beside_away_bytes(one, places, chosen.host)
    whole = tiers.kept_bytes(one, places)
    last = tiers.last_kept_bytes(one, places, work.supervised)
    kept = (chosen.kept - 1) * whole + last if chosen.kept else 0
    # Kept layers are gone before one is computed again. A last one that is kept alone may take more
    # than that; then one layer's large tensors are on their way, not two.
    middle = whole - away - stays
    at_last = last - stays - away
    computing = (max(middle - stays, at_last), max(middle - last, -away), 0)[min(chosen.kept, 2)]
    forward = _fused_forward_buffers(shapes, work, one, chosen, stays)
    backward = tiers.live_bytes(one, places)
    tables = flows
    if 0 < chosen.chunk < places:
        tables = ("backward",)  # of this package's own attention kernel; others turn by chunks
        how = one, places, chosen.chunk, chosen.host
        before = chunks.before_last_bytes(*how, stays, work.split)
        forward = max(before, chunks.forward_bytes(*how, work.supervised, work.split))
        computing, backward = 0, chunks.backward_bytes(*how, work.split)
    return (
        Term("adapters, rounded", (layers - chosen.held) * tiers.shadow_bytes(one), PHASES),
        Term(
            "adapters, rounded, of layers to be held",
            chosen.held * tiers.shadow_bytes(one),
            PHASES[:2],
        ),
        Term("weights held in 16 bits", chosen.held * tiers.held_bytes(one), run),
        Term(
            "weights of the layer at work, 16 bits",
            tiers.scratch_bytes(one) if chosen.held < layers else 0,
            run,
        ),
        Term("gradients of its adapters, fp32", tiers.product_bytes(one), run),
        Term("ids, targets, positions and owners", tiers.index_bytes(places), flows),
        Term("cosines and sines", tiers.turn_bytes(one, places), tables),
        Term(f"kept whole by {chosen.kept} layers", kept, flows),
        Term(
            f"{'inputs' if chosen.host == 'nothing' else 'small parts'} of {recomputed} layers",
            recomputed * stays,
            flows,
        ),
        Term("large tensors on their way to and from the host", min(2, recomputed) * away, flows),
        Term(
            "forward: buffers of a layer",
            forward,
            ("forward",),
        ),
        Term(
            "logits of a chunk, and supervised places", fused_head_bytes(shapes, work), ("logits",)
        ),
        Term("the layer that is computed again", computing, ("backward",)),
        Term(
            "backward: gradient of a layer's output",
            tiers.gradient_bytes(one, places),
            ("backward",),
        ),
        Term("backward: buffers of a layer", backward, ("backward",)),
        Term(
            "heads that ranks exchange",
            0 if 0 < chosen.chunk < places else chunks.exchange_bytes(one, places, work.split),
            ("backward",),
        ),
    )


def _fused_forward_buffers(
    shapes: Shapes, work: Work, one: Sizes, chosen: Tiers, stays: int
) -> int:
    """Most that a layer holds beside what is kept of all.

    It is the one before the last, or the last, which ends at supervised places. `stays`: what a
    recomputed layer leaves on the GPU.
    """
    a, places, hidden, supervised = work.act, work.places, shapes.hidden, work.supervised
    kept = chosen.kept
    counted = a * places * hidden * (chosen.host == "all")  # the middle, on its way to the host
    product = shapes.intermediate + one.down.rank  # of gate and up
    whole, last = tiers.kept_bytes(one, places), tiers.last_kept_bytes(one, places, supervised)
    # a product that a norm follows is part of what is kept, unless it is on its way to the host
    counted_twice = one.after_down and chosen.host != "all"
    before = (
        a * places * (product + (2 + (kept <= 2) - counted_twice) * hidden)
        - (kept <= 2) * counted
        + (kept <= 1) * (whole - stays)
        - (last if kept else stays)
    )
    after_gate = a * supervised * (product + (1 - counted_twice) * hidden)
    before_gate = a * places * (hidden + one.qkv.rank + one.turned)
    before_gate -= a * supervised * one.gate_up.rows
    at_last = (
        a * places * (1 + (kept <= 1)) * hidden
        - (kept <= 1) * counted
        + max(after_gate, before_gate)
        + (kept == 0) * (last - stays)
    )
    return max(before, at_last)


def fused_head_bytes(shapes: Shapes, work: Work) -> int:
    """Of the engine `fused`, see tiers.py."""
    return tiers.head_bytes(shapes.vocabulary, shapes.hidden, work.supervised, work.act)


PROFILES: dict[str, Callable[[Shapes, Work], tuple[Term, ...]]] = {"peft": _peft, "fused": _fused}
